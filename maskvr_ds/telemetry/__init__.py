"""Metrics of a run: log, file format, plots, monitors."""
