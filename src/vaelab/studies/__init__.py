"""Work with several runs: recipes against published numbers, runs side by side, grids of settings."""
