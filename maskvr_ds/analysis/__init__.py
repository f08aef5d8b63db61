"""Instruments that look into a model or a run."""
