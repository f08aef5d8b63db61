"""The DeepSpeed engine. The only package that calls deepspeed.initialize or patches DeepSpeed."""
