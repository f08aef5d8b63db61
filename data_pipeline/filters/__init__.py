"""Document filters: quality rules, n-gram decontamination, MinHash deduplication."""
