"""Corpus to batches: data order, mixtures, vocabulary statistics."""
