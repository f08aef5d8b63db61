"""LAMB and LARS for DeepSpeed: public names of `maskvr_ds.optim.lamb`."""

from maskvr_ds.optim.build_locks import avoid_shared_memory_op
from maskvr_ds.optim.lamb import VARIANTS, Lamb, Lars, Variant, bind, parameter_groups

__all__ = ["VARIANTS", "Lamb", "Lars", "Variant", "bind", "parameter_groups"]

# Before the script that imports this calls DeepSpeed.
avoid_shared_memory_op()
