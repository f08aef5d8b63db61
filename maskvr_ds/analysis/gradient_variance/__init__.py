"""Gradient variance, split into its data part and its mask part."""
