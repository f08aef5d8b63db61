"""Analysis of models and runs."""
