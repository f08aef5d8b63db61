"""Attention heads: patterns of their maps, and what a model loses without them."""
