"""Model of memory, time, communication and energy of a run. Loads no torch."""
