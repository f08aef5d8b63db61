"""LAMB and LARS under ZeRO. Loads no torch itself: `variants` is read by the configuration."""
