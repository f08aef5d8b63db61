"""The only file that calls deepspeed.initialize.

ds_configs/*.json own ZeRO stage, precision, communication and offload; RunConfig owns what OWNED lists, which
stands as "auto" in the JSON or not at all.
"""

import json
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger, safe_get_full_fp32_param
from transformers import BertConfig

from maskvr_ds import distributed, hashing, lamb
from maskvr_ds.config import BatchConfig, ConfigError, ModelConfig, OptimizerConfig
from maskvr_ds.model import MaskedLanguageModel

# DeepSpeed's key → where RunConfig has it.
OWNED = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "steps_per_print": "monitor",
    "tensorboard": "monitor.tensorboard",
    "csv_monitor": "monitor.csv",
    "wandb": "monitor.wandb",
}
# The stages that maskvr_ds.lamb and the checkpoints are proven for.
SUPPORTED_STAGES = (0, 1, 2)


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """The JSON as written. Raises ConfigError where it is not valid or sets what RunConfig owns."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a JSON object expected, found {type(config).__name__}")
    for key, owner in OWNED.items():
        if config.get(key, "auto") != "auto":
            raise ConfigError(
                f"{path}: sets {key} to {config[key]!r}, which belongs to the run's config; "
                f'remove the key (or write "auto") and set {owner} there'
            )
    stage = zero_stage(config)
    if stage not in SUPPORTED_STAGES:
        raise ConfigError(f"{path}: ZeRO stage {stage}; supported are {', '.join(map(str, SUPPORTED_STAGES))}")
    if config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path}: fp16 is enabled; supported are fp32 and bf16")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration; absent means 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the model computes in."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def complete_deepspeed_config(
    config: dict[str, Any], batch: BatchConfig, optimizer: OptimizerConfig, *, accumulation: int
) -> dict[str, Any]:
    """The JSON with what RunConfig owns put in."""
    config = {key: value for key, value in config.items() if key not in OWNED}
    config.update(
        train_batch_size=batch.global_size,
        train_micro_batch_size_per_gpu=batch.micro_size,
        gradient_accumulation_steps=accumulation,
        # Always set: left out, DeepSpeed clips at 1.0.
        gradient_clipping=optimizer.gradient_clipping,
        # Its console lines would wait for the device; metrics.jsonl has the figures.
        steps_per_print=None,
    )
    if optimizer.name == "adam":
        # FusedAdam on a GPU; on a CPU torch's, since DeepSpeed's would be compiled at first use.
        on_cpu = distributed.device().type == "cpu"
        params = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps}
        config["optimizer"] = {"type": "AdamW", "params": {**params, "torch_adam": on_cpu}}
    else:
        config["zero_allow_untested_optimizer"] = True
    return config


def create_engine(
    bert: BertConfig,
    deepspeed_config: dict[str, Any],
    *,
    model: ModelConfig,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    accumulation: int,
    seed: int,
) -> deepspeed.DeepSpeedEngine:
    """Model with initial weights from `seed`, optimizer and engine. `deepspeed_config` as read from the JSON."""
    # Its warnings here are that the optimizer is not one of its own.
    logger.setLevel(logging.ERROR)
    torch.manual_seed(hashing.fold(seed) >> 1)
    module = MaskedLanguageModel(bert, activation_checkpointing=model.activation_checkpointing)
    groups = lamb.parameter_groups(module, optimizer.weight_decay)
    client = None
    if optimizer.name == "lamb":
        client = lamb.Lamb(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=groups,
        optimizer=client,
        config=complete_deepspeed_config(deepspeed_config, batch, optimizer, accumulation=accumulation),
    )
    if client is not None:
        lamb.bind(engine)
    return engine


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def step_and_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | float:
    """engine.step() at the end of an accumulation; → the global gradient norm before clipping, L2."""
    norm = None
    if not hasattr(engine.optimizer, "_global_grad_norm"):
        # ZeRO 0 in fp32: every rank holds the averaged gradients, and DeepSpeed keeps no norm of them.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


def full_fp32_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Name → fp32 weights on the CPU, master weights where the model computes in less; tied ones appear once. On rank
    0; empty on the others.

    One all-reduce a parameter over the data-parallel group under ZeRO: every rank must call.
    """
    # ZeRO 0 in bf16 (FP16_UnfusedOptimizer) keeps whole masters in lists beside the parameters.
    optimizer = engine.optimizer
    low, high = getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])
    beside = {p: master for ps, masters in zip(low, high, strict=True) for p, master in zip(ps, masters, strict=True)}
    weights = {}
    for name, parameter in engine.module.mlm.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is None:
            master = beside.get(parameter, parameter)
        assert master.dtype == torch.float32, f"{name}: no fp32 master weights in {type(optimizer).__name__}"
        if distributed.rank() == 0:
            # A copy: safetensors refuses tensors that share storage, as DeepSpeed's flattened ones do.
            weights[name] = master.detach().to("cpu", copy=True)
    return weights
