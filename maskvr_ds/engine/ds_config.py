"""DeepSpeed configurations completed for a run, and what they mean for torch.

Reading and checking ds_configs/*.json, without torch: maskvr_ds/config/deepspeed.py.
"""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from maskvr_ds.config import BatchConfig, ConfigError, OptimizerConfig
from maskvr_ds.config.deepspeed import OWNED, enabled
from maskvr_ds.runtime import distributed


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    """Dtype of the model's parameters and activations."""
    if enabled(config, "fp16"):
        return torch.float16
    return torch.bfloat16 if enabled(config, "bf16") else torch.float32


def check_device(config: dict[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed does not support the precision on this machine, by its own check."""
    if enabled(config, "fp16") and not get_accelerator().is_fp16_supported():
        name = get_accelerator().device_name()
        raise ConfigError(
            f"fp16 is enabled, but DeepSpeed's accelerator on this machine, {name!r}, does not support it "
            "(Type fp16 is not supported on your device); set deepspeed to a bf16 or fp32 configuration"
        )


def complete_deepspeed_config(
    config: dict[str, Any], batch: BatchConfig, optimizer: OptimizerConfig, *, accumulation: int
) -> dict[str, Any]:
    """`config` completed with the keys that RunConfig owns. accumulation: micro-batches per step and rank."""
    config = {key: value for key, value in config.items() if key not in OWNED}
    config.update(
        train_batch_size=batch.global_size,
        train_micro_batch_size_per_gpu=batch.micro_size,
        gradient_accumulation_steps=accumulation,
        # Always set: by default DeepSpeed clips at 1.0.
        gradient_clipping=optimizer.gradient_clipping,
        # DeepSpeed's console lines would wait for the device; metrics.jsonl has the same figures.
        steps_per_print=None,
    )
    if optimizer.name == "adam":
        # FusedAdam on GPUs; torch's on CPUs, since DeepSpeed's would be compiled at first use.
        on_cpu = distributed.device().type == "cpu"
        params = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps}
        config["optimizer"] = {"type": "AdamW", "params": {**params, "torch_adam": on_cpu}}
    else:
        config["zero_allow_untested_optimizer"] = True
        # With offload DeepSpeed would otherwise accept only its own optimizer.
        config["zero_force_ds_cpu_optimizer"] = False
    return config
