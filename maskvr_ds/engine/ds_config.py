"""DeepSpeed configurations: ds_configs/*.json read, checked and completed."""

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from maskvr_ds.config import BatchConfig, ConfigError, OptimizerConfig
from maskvr_ds.runtime import distributed

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
SUPPORTED_STAGES = (0, 1, 2, 3)


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
    if unproven := _unproven(config):
        raise ConfigError(f"{path}: {unproven}")
    return config


def _malformed(config: dict[str, Any]) -> str | None:
    """What of the sections read here is not of its kind; None if all is well."""
    for name in ("zero_optimization", "fp16", "bf16", "data_types"):
        if not isinstance(section := config.get(name, {}), dict):
            return f"{name} is {json.dumps(section)}; an object expected"
    zero = config.get("zero_optimization", {})
    if type(stage := zero.get("stage", 0)) is not int:
        return f"zero_optimization.stage is {json.dumps(stage)}; a whole number expected"
    if not isinstance(offload := zero.get("offload_optimizer") or {}, dict):
        return f"zero_optimization.offload_optimizer is {json.dumps(offload)}; an object expected"
    for name in ("fp16", "bf16"):
        # "auto" is off for DeepSpeed.
        if not isinstance(on := config.get(name, {}).get("enabled", False), bool):
            return f"{name}.enabled is {json.dumps(on)}; true or false expected"
    return None


def _unproven(config: dict[str, Any]) -> str | None:
    """What of a DeepSpeed configuration is not supported, or contradicts itself; None if all is well."""
    if malformed := _malformed(config):
        return malformed
    if "bfloat16" in config:
        return "bfloat16 is an old name; call the section bf16"
    if wrapped := next((name for name in ("amp", "torch_autocast") if config.get(name)), None):
        return f"{wrapped} is not supported; remove it, and enable bf16 or fp16"
    if not config.get("managed_gradient_accumulation", True):
        return "managed_gradient_accumulation is off, and every micro-batch would be an update; remove it"
    zero = config.get("zero_optimization", {})
    if not zero.get("compute_grad_norm", True):
        return "zero_optimization.compute_grad_norm is off; every step is judged by its norm: remove it"
    stage = zero_stage(config)
    if stage not in SUPPORTED_STAGES:
        return f"ZeRO stage {stage}; supported are {', '.join(map(str, SUPPORTED_STAGES))}"
    if enabled(config, "fp16") and enabled(config, "bf16"):
        return "both fp16 and bf16 are enabled; choose one"
    if enabled(config, "fp16") and stage == 0:
        # Its engine.backward scales the loss for ZeRO's optimizers only; the others divide by the scale all the same.
        return "fp16 at ZeRO stage 0, where DeepSpeed 0.19 does not scale the loss; use stage 1, 2 or 3"
    gradients = config.get("data_types", {}).get("grad_accum_dtype")
    if stage == 0 and enabled(config, "bf16") and gradients not in (None, "bf16", "bfloat16"):
        return f"data_types.grad_accum_dtype {gradients!r} with bf16 needs ZeRO stage 1, 2 or 3, found stage 0"
    if config.get("fp16", {}).get("auto_cast"):
        return "fp16.auto_cast is set; token ids are not to be cast: remove it"
    if zero.get("round_robin_gradients") and stage in (1, 2):
        # safe_get_full_fp32_param then gives parameters the master weights of others.
        return "round_robin_gradients, with which DeepSpeed 0.19 cannot tell whose master weights are whose; remove it"
    if zero.get("offload_param"):
        return "offload_param is not supported; offload_optimizer is"
    offload = zero.get("offload_optimizer") or {}
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        return f"offload_optimizer.device {device!r}; supported are 'none' and 'cpu'"
    if device == "cpu" and stage == 0:
        # DeepSpeed would keep the optimizer on the device without a word.
        return "offload_optimizer needs ZeRO stage 1, 2 or 3, found stage 0"
    if device == "cpu" and (offload.get("ratio", 1.0) != 1.0 or offload.get("super_offload")):
        return "offload_optimizer.ratio below 1 and super_offload work with DeepSpeedCPUAdam only; remove them"
    return None


def enabled(config: dict[str, Any], precision: str) -> bool:
    """Whether a DeepSpeed configuration turns "fp16" or "bf16" on."""
    return bool(config.get(precision, {}).get("enabled"))


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration; absent means 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the model computes in."""
    if enabled(config, "fp16"):
        return torch.float16
    return torch.bfloat16 if enabled(config, "bf16") else torch.float32


def check_device(config: dict[str, Any]) -> None:
    """Raise ConfigError where DeepSpeed refuses the precision on this machine, by the question that it asks itself."""
    if enabled(config, "fp16") and not get_accelerator().is_fp16_supported():
        name = get_accelerator().device_name()
        raise ConfigError(
            f"fp16 is enabled, and DeepSpeed says of this machine's {name!r}: Type fp16 is not supported on your "
            "device. Set deepspeed to a configuration in bf16 or fp32"
        )


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
        # Offloaded, DeepSpeed would take no optimizer but its own.
        config["zero_force_ds_cpu_optimizer"] = False
    return config
