"""Several processes that train one model, and the memory that they share."""
