"""Contents of a run directory. Loads no torch."""
