"""Tensors to disk and back: saving, loading, resharding, export."""
