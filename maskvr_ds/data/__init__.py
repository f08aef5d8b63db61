"""From corpus to batches: data order, mixtures, vocabulary statistics."""
