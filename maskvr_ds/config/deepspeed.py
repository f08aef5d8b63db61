"""DeepSpeed configurations: finds, reads and checks ds_configs/*.json. Loads no torch.

The JSON owns ZeRO stage, precision, communication and offload. RunConfig owns the keys of OWNED, which are absent from
the JSON or "auto".
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maskvr_ds.config.base import ConfigError, shown

# DeepSpeed's key → its place in RunConfig.
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

# ZeRO stages that maskvr_ds.lamb and the checkpoints are tested with.
SUPPORTED_STAGES = (0, 1, 2, 3)
_MAX_BYTES = 1 << 20
# Largest number in a file; buffers of more bytes exist nowhere.
_LARGEST = 1e15


def read_deepspeed_config(path: Path, *, guarded: bool = True, compiled: bool = False) -> dict[str, Any]:
    """The file's content, with the keys of OWNED absent or "auto".

    guarded: whether the run's divergence guard is enabled, which holds back updates whose gradients are not finite.
    compiled: whether parts of the model are compiled (training.compile).
    Raises ConfigError if it is not valid JSON, sets a key that RunConfig owns, or asks for something unsupported.
    """
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes, at most {_MAX_BYTES:,} expected in a DeepSpeed configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ConfigError(f"{path}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # also of text that is not UTF-8
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    for key, owner in OWNED.items():
        if config.get(key, "auto") != "auto":
            raise ConfigError(
                f"{path}: sets {key} to {config[key]!r}, which the run's config owns; "
                f'remove the key (or set it to "auto") and set {owner} in the run config'
            )
    if fault := _out_of_bounds(config) or _malformed(config) or _unsupported(config):
        raise ConfigError(f"{path}: {fault}")
    if enabled(config, "bf16") and not config["bf16"].get("check_grad_overflow", True) and not guarded:
        # DeepSpeed's check is tensor by tensor: 2,600 more kernels in each step of BERT-base at stage 2.
        raise ConfigError(
            f"{path}: bf16.check_grad_overflow is false, and so is divergence.enabled: nothing would keep NaN "
            "gradients from the weights; set one of them to true"
        )
    if compiled and zero_stage(config) == 3:
        raise ConfigError(
            f"{path}: training.compile needs ZeRO stage 0, 1 or 2: stage 3 gathers parameters in hooks of the modules, "
            "which cannot be compiled; set deepspeed to another file, or training.compile to none"
        )
    return config


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"key {repeated} is given twice; remove one of them")
    return dict(pairs)


def _out_of_bounds(value: Any, where: str = "") -> str | None:
    """The first number that is infinite, NaN or above 10^15, as a message; None if there is none."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = ((f"{where}.{name}" if where else name, entry) for name, entry in value.items())
    elif isinstance(value, list):
        items = ((f"{where}.{index}", entry) for index, entry in enumerate(value))
    elif isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
        return f"{where} is {shown(value)}; a finite number of at most {_LARGEST:g} expected"
    return next((fault for name, entry in items if (fault := _out_of_bounds(entry, name))), None)


def _malformed(config: dict[str, Any]) -> str | None:
    """The first section or key of the wrong type, as a message; None if there is none."""
    for name in ("zero_optimization", "fp16", "bf16", "data_types"):
        if not isinstance(section := config.get(name, {}), dict):
            return f"{name} is {json.dumps(section)}; expected an object"
    zero = config.get("zero_optimization", {})
    if type(stage := zero.get("stage", 0)) is not int:
        return f"zero_optimization.stage is {json.dumps(stage)}; expected an integer"
    if not isinstance(offload := zero.get("offload_optimizer") or {}, dict):
        return f"zero_optimization.offload_optimizer is {json.dumps(offload)}; expected an object"
    for name in ("fp16", "bf16"):
        # DeepSpeed takes "auto" for off.
        if not isinstance(on := config.get(name, {}).get("enabled", False), bool):
            return f"{name}.enabled is {json.dumps(on)}; expected true or false"
    return None


def _unsupported(config: dict[str, Any]) -> str | None:
    """The first setting that is unsupported or contradicts another one, as a message; None if there is none."""
    if "bfloat16" in config:
        return "bfloat16 is an old name; rename the section to bf16"
    if wrapped := next((name for name in ("amp", "torch_autocast") if config.get(name)), None):
        return f"{wrapped} is not supported; remove it and enable bf16 or fp16"
    if not config.get("managed_gradient_accumulation", True):
        return "managed_gradient_accumulation is off, so every micro-batch would be an update; remove it"
    zero = config.get("zero_optimization", {})
    if not zero.get("compute_grad_norm", True):
        return "zero_optimization.compute_grad_norm is off, but the divergence guard needs the norm; remove it"
    stage = zero_stage(config)
    if stage not in SUPPORTED_STAGES:
        return f"ZeRO stage {stage}; supported are {', '.join(map(str, SUPPORTED_STAGES))}"
    if enabled(config, "fp16") and enabled(config, "bf16"):
        return "both fp16 and bf16 are enabled; choose one"
    if enabled(config, "fp16") and stage == 0:
        # engine.backward scales the loss for ZeRO's optimizers only; the others divide by the scale nevertheless.
        return "fp16 at ZeRO stage 0: DeepSpeed 0.19 does not scale the loss there; use stage 1, 2 or 3"
    gradients = config.get("data_types", {}).get("grad_accum_dtype")
    if stage == 0 and enabled(config, "bf16") and gradients not in (None, "bf16", "bfloat16"):
        return f"data_types.grad_accum_dtype {gradients!r} with bf16 needs ZeRO stage 1, 2 or 3, found stage 0"
    if config.get("fp16", {}).get("auto_cast"):
        return "fp16.auto_cast is set and would cast token ids; remove it"
    if zero.get("round_robin_gradients") and stage in (1, 2):
        # safe_get_full_fp32_param then returns master weights of other parameters.
        return "round_robin_gradients is set, and DeepSpeed 0.19 then mixes up master weights; remove it"
    if zero.get("offload_param"):
        return "offload_param is not supported; use offload_optimizer"
    offload = zero.get("offload_optimizer") or {}
    device = offload_device(config)
    if device not in ("none", "cpu"):
        return f"offload_optimizer.device {device!r}; supported are 'none' and 'cpu'"
    if device == "cpu" and stage == 0:
        # DeepSpeed would silently keep the optimizer on the device.
        return "offload_optimizer needs ZeRO stage 1, 2 or 3, found stage 0"
    if device == "cpu" and (offload.get("ratio", 1.0) != 1.0 or offload.get("super_offload")):
        return "offload_optimizer.ratio below 1 and super_offload work only with DeepSpeedCPUAdam; remove them"
    return None


def enabled(config: dict[str, Any], precision: str) -> bool:
    """Whether a DeepSpeed configuration enables `precision`, "fp16" or "bf16"."""
    return bool(config.get(precision, {}).get("enabled"))


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration; 0 if absent."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_device(config: dict[str, Any]) -> str:
    """Where a DeepSpeed configuration keeps the optimizer's state: "cpu", or "none" for the device that trains."""
    device: str = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    return device
