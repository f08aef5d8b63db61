"""Gradient variance, decomposed into the part due to the data and the part due to the masks."""
