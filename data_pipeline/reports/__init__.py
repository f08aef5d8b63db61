"""Statistics, plots and descriptions of a corpus."""
