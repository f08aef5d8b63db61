"""Fault tolerance: divergence guard, signals, watchdog, local launcher."""
