"""Variance-reduced BERT pretraining on DeepSpeed. Importing it loads neither torch nor deepspeed."""

__version__ = "0.1.0"
