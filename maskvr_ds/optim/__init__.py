"""LAMB and LARS for DeepSpeed ZeRO. Imports no torch here: the configuration reads `variants`."""
