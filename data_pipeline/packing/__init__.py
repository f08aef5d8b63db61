"""Stage 2: token shards to rows of a corpus."""
