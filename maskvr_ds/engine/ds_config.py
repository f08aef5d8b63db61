"""DeepSpeed configurations completed for a run, and what they mean for torch.

Reading and checking ds_configs/*.json, without torch: maskvr_ds/config/deepspeed.py.
"""

import importlib.util
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from maskvr_ds.config import BatchConfig, ConfigError, OptimizerConfig
from maskvr_ds.config.deepspeed import OWNED, enabled, offload_device
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


def check_fused(config: dict[str, Any]) -> None:
    """Raise ConfigError if LAMB's Triton kernels cannot run on this machine with this configuration."""
    if (offload := offload_device(config)) != "none":
        raise ConfigError(
            f"optimizer.fused is true, but offload_optimizer.device is {offload!r}: the kernels run on GPUs; "
            "set one of them differently"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "optimizer.fused is true, but Triton is not installed; install triton or set optimizer.fused to false"
        )
    from maskvr_ds.optim.fused import INTERPRETED

    if distributed.device().type != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"optimizer.fused is true, but this rank trains on {distributed.device().type}: the kernels run on GPUs; "
            "set optimizer.fused to false"
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
        # Waits for the device twice per micro-batch; nothing reads it.
        timers={**(config.get("timers") or {}), "throughput": {"enabled": False}},
    )
    if optimizer.name == "adamw":
        # FusedAdam on GPUs; torch's on CPUs, since DeepSpeed's would be compiled at first use. Fused: one pass over
        # memory, where torch's default makes two temporary tensors of the size of the model.
        on_cpu = distributed.device().type == "cpu"
        params = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps, "torch_adam": on_cpu}
        config["optimizer"] = {"type": "AdamW", "params": {**params, **({"fused": True} if on_cpu else {})}}
    else:
        config["zero_allow_untested_optimizer"] = True
        # With offload DeepSpeed would otherwise accept only its own optimizer.
        config["zero_force_ds_cpu_optimizer"] = False
    return config
