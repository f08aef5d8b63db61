"""Benchmarks of the loader, masking, optimizer and training steps; comparison of strategies by training."""
