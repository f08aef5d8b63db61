"""Stage 1: documents to token shards."""
