"""Configuration of a run, validated before training starts. Loads no torch.

Public names of the package: RunConfig is in `run.py`, its sections are in the other modules.
"""

from maskvr_ds.config.base import ConfigError
from maskvr_ds.config.data import DataConfig
from maskvr_ds.config.hub_names import with_local_model
from maskvr_ds.config.loading import recipe_parts, recipe_text, recipes
from maskvr_ds.config.masking import AutoConfig, MapNetConfig, MaskingConfig
from maskvr_ds.config.model import ModelConfig
from maskvr_ds.config.objectives import Objectives
from maskvr_ds.config.options import add_config_options, add_run_options
from maskvr_ds.config.reliability import CheckpointConfig, DivergenceConfig, HangsConfig, ReplicasConfig
from maskvr_ds.config.run import RunConfig, deepspeed_config_path, dump_config, load_config, run_deepspeed_config
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
    "Objectives",
    "OptimizerConfig",
    "ReplicasConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "WandbConfig",
    "add_config_options",
    "add_run_options",
    "deepspeed_config_path",
    "dump_config",
    "load_config",
    "recipe_parts",
    "recipe_text",
    "recipes",
    "run_deepspeed_config",
    "with_local_model",
]
