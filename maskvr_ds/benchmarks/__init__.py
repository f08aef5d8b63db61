"""Benchmarks of training steps, optimizer, masks and strategies."""
