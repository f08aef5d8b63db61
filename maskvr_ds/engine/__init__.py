"""The DeepSpeed engine: the only package that initialises or patches DeepSpeed."""
