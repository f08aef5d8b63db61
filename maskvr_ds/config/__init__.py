"""Configuration of a run, checked before anything is spent. Loads no torch.

The public names; `run.py` has RunConfig, the other modules one group of sections each.
"""

from maskvr_ds.config.base import ConfigError
from maskvr_ds.config.data import DataConfig
from maskvr_ds.config.loading import recipe_text, recipes
from maskvr_ds.config.masking import AutoConfig, MapNetConfig, MaskingConfig
from maskvr_ds.config.model import ModelConfig
from maskvr_ds.config.options import add_config_options, add_run_options
from maskvr_ds.config.reliability import CheckpointConfig, DivergenceConfig, HangsConfig
from maskvr_ds.config.run import RunConfig, deepspeed_config_path, dump_config, load_config
from maskvr_ds.config.training import (
    BatchConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    WandbConfig,
)

__all__ = [
    "AutoConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DivergenceConfig",
    "EvaluationConfig",
    "HangsConfig",
    "MapNetConfig",
    "MaskingConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "WandbConfig",
    "add_config_options",
    "add_run_options",
    "deepspeed_config_path",
    "dump_config",
    "load_config",
    "recipe_text",
    "recipes",
]
