"""Raw text to pre-tokenised, unmasked Arrow shards. Needs neither torch nor deepspeed."""
