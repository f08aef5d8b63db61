"""LAMB and LARS for DeepSpeed: public names of `maskvr_ds.optim.lamb`."""

from maskvr_ds.optim.lamb import VARIANTS, Lamb, Lars, Variant, bind, parameter_groups

__all__ = ["VARIANTS", "Lamb", "Lars", "Variant", "bind", "parameter_groups"]
