"""The only file that calls deepspeed.initialize.

ds_configs/*.json own ZeRO stage, precision, communication and offload; RunConfig owns what OWNED lists, which
stands as "auto" in the JSON or not at all.
"""

import gc
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger, safe_get_full_fp32_param
from torch._utils import _unflatten_dense_tensors
from transformers import BertConfig

from maskvr_ds import hashing
from maskvr_ds.config import BatchConfig, ConfigError, ModelConfig, OptimizerConfig
from maskvr_ds.models import pretrained
from maskvr_ds.models.bert import MaskedLanguageModel
from maskvr_ds.models.pretrained import InitialWeights
from maskvr_ds.optim import lamb
from maskvr_ds.optim.partitions import layout_of, trained
from maskvr_ds.runtime import distributed


def _import_muon() -> None:
    """DeepSpeed 0.19 asks of every optimizer whether it is Muon, and imports for that a module which hands three
    functions to torch.compile: seconds at every start, for a compiler that nothing here uses. So it is imported now,
    and they stay as they are. A version that has no such module needs none of this."""
    compiler, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ModuleNotFoundError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compiler


_import_muon()
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


def create_engine(
    bert: BertConfig,
    deepspeed_config: dict[str, Any],
    *,
    model: ModelConfig,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    accumulation: int,
    seed: int,
    initial: InitialWeights | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Model with initial weights from `seed` or `initial`, optimizer and engine. `deepspeed_config` as read from the
    JSON.

    Raises ConfigError, on every rank alike, where this machine cannot compute in the precision, or weights do not fit.
    """
    distributed.agreed(lambda: check_device(deepspeed_config))
    # Its warnings here are that the optimizer is not one of its own.
    logger.setLevel(logging.ERROR)
    torch.manual_seed(hashing.fold(seed) >> 1)
    module = MaskedLanguageModel(bert, activation_checkpointing=model.activation_checkpointing)
    if initial is not None:
        pretrained.load(module.mlm, initial)
    # DeepSpeed rounds parameters first and makes their fp32 masters of what is left.
    exact = {}
    if initial is not None and model_dtype(deepspeed_config) != torch.float32:
        exact = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    groups = lamb.parameter_groups(module, optimizer.weight_decay)
    client = None
    if optimizer.name == "lamb":
        client = lamb.Lamb(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, variant=optimizer.lamb_variant()
        )
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=groups,
        optimizer=client,
        config=complete_deepspeed_config(deepspeed_config, batch, optimizer, accumulation=accumulation),
    )
    distributed.agreed(lambda: _check_dtype(engine, model_dtype(deepspeed_config)))
    if exact:
        distributed.agreed(lambda: _set_masters(engine, exact))
    if client is not None:
        distributed.agreed(lambda: lamb.bind(engine))
    if loss_scale(engine) is not None:
        _hold_loss_scale(engine.optimizer)
    return engine


def _check_dtype(engine: deepspeed.DeepSpeedEngine, expected: torch.dtype) -> None:
    """Raise ConfigError where DeepSpeed has read the precision in another way than this module."""
    if (found := next(engine.module.parameters()).dtype) != expected:
        raise ConfigError(f"DeepSpeed has made a model of {found} of a configuration that asks for {expected}")


def free_memory() -> None:
    """After an engine was destroyed and forgotten: its parts refer to each other, and only this lets go of them.

    At stage 3 DeepSpeed 0.19 also keeps a module in a list of its own, and the parameters' coordinator in the cache of
    one of its methods.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in method.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    gc.collect()
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()


def partition_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Elements of the flat partitions that ZeRO cut on this rank; none at stage 0. Equal on all ranks."""
    if engine.zero_optimization_stage() == 0:
        return []
    groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    if engine.zero_optimization_stage() == 3:
        groups = [engine.optimizer.fp32_partitioned_groups_flat]
    return [flat.numel() for flats in groups for flat in flats]


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """What the loss is multiplied by before the next backward pass in fp16; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def _hold_loss_scale(optimizer: Any) -> None:
    """Keep the loss scale as it is during optimizer.step(); `step_and_norm` updates it afterwards.

    DeepSpeed 0.19 updates the scale first and divides the gradients by it then: in a step in which it grows, they come
    out half as large as they are, and clipping sees half their norm.
    """
    optimizer._update_scale = lambda overflow: None


def whole_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | None:
    """Global gradient norm at ZeRO 0 in fp32, where every rank holds the averaged gradients and DeepSpeed keeps no norm
    of them; None elsewhere."""
    if engine.optimizer is not engine.basic_optimizer:
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def step_and_norm(engine: deepspeed.DeepSpeedEngine, norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
    """engine.step() at the end of an accumulation; → the global gradient norm before clipping, L2.

    norm: what `whole_norm` gave. In fp16 the norm is that of the gradients without loss scale. Where they overflow, the
    norm is inf, DeepSpeed leaves the update out and the loss scale is halved. Raises FloatingPointError, on every rank
    alike, where it cannot be.
    """
    scale = loss_scale(engine)
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    if scale is None:
        return norm
    overflow = bool(engine.optimizer.overflow)
    smallest = engine._config.float16_config.min_loss_scale if engine.dynamic_loss_scale() else scale
    if overflow and scale <= smallest:
        raise FloatingPointError(
            f"gradients overflow at the loss scale {scale:g}, which cannot fall further (fp16.loss_scale, "
            "fp16.min_loss_scale); resume from the last checkpoint with a lower optimizer.lr, or in bf16"
        )
    type(engine.optimizer)._update_scale(engine.optimizer, overflow)
    return norm


def full_fp32_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Name → fp32 weights on the CPU, master weights where the model computes in less; tied ones appear once. On rank
    0; empty on the others.

    One collective a parameter over the data-parallel group under ZeRO: every rank must call.
    """
    beside = _masters_beside(engine.optimizer)
    weights = {}
    for name, parameter in engine.module.mlm.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is None:
            master = beside.get(parameter, parameter)
        assert master.dtype == torch.float32, f"{name}: no fp32 master weights in {type(engine.optimizer).__name__}"
        if distributed.rank() == 0:
            # A copy: safetensors refuses tensors that share storage, as DeepSpeed's flattened ones do.
            weights[name] = master.detach().to("cpu", copy=True)
    return weights


def _masters_beside(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """Parameter → whole fp32 master, where ZeRO 0 in bf16 keeps them in lists beside the parameters."""
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        masters = optimizer.fp32_groups
    elif isinstance(optimizer, FP16_Optimizer):
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        masters = [_unflatten_dense_tensors(group_flat, group) for group_flat, group in flat]
    else:
        return {}
    groups = zip(optimizer.fp16_groups, masters, strict=True)
    return {p: master for group, of_group in groups for p, master in zip(group, of_group, strict=True)}


@torch.no_grad()
def _set_masters(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> None:
    """Have the fp32 masters be these weights, of which the engine's parameters are the rounded values. Not a
    collective."""
    if beside := _masters_beside(engine.optimizer):
        for name, parameter in engine.module.named_parameters():
            beside[parameter].copy_(weights[name])
        return
    given = [p for group in lamb.parameter_groups(engine.module) for _, p in group["params"]]
    layout = layout_of(engine, trained([{"params": given}]), engine.basic_optimizer.param_groups)
    for flat, partition in layout.partitions.items():
        for fragment in partition.fragments:
            whole = weights[layout.names[fragment.tensor]].view(-1)
            here = fragment.of_partition(flat.detach())
            here.copy_(whole.narrow(0, fragment.tensor_start, fragment.length).view(here.shape))


def not_rounded(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that are not their fp32 weights, as `full_fp32_weights` gave them, rounded.

    On rank 0; empty on the others. Under ZeRO 3 one all-gather a parameter: every rank must call.
    """
    differing: list[str] = []
    for name, parameter in engine.module.mlm.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=is_zero_param(parameter)):
            # Compared on the rank that has them; the others only lend their parts.
            if name in weights and not torch.equal(weights[name].to(parameter.dtype), parameter.detach().cpu()):
                differing.append(name)
    return differing
