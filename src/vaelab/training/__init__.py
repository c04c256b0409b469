"""How a run is trained: its state, its steps, and what compiles them."""
