"""Creating and stepping the DeepSpeed engine; the only module that calls deepspeed.initialize.

Collectives: those of deepspeed.initialize and engine.step, and `distributed.run_collectively` in `create_engine`.
"""

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from transformers import PreTrainedConfig

from maskvr_ds import hashing
from maskvr_ds.config import BatchConfig, ConfigError, ModelConfig, OptimizerConfig
from maskvr_ds.config.deepspeed import offload_device, zero_stage
from maskvr_ds.engine.deepspeed_patches import (
    check_deepspeed,
    hold_loss_scale,
    import_muon,
    quiet_memory,
    update_loss_scale,
)
from maskvr_ds.engine.ds_config import check_device, check_fused, complete_deepspeed_config, model_dtype
from maskvr_ds.engine.master_weights import set_masters, undo_initial_step
from maskvr_ds.engine.streamline import streamline
from maskvr_ds.models import pretrained
from maskvr_ds.models.capabilities import check_buffers, check_model
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.initial_folder import InitialWeights
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.models.normalization import replace_layer_norms
from maskvr_ds.optim import lamb
from maskvr_ds.optim.build_locks import check_build_lock
from maskvr_ds.optim.layerwise import LayerwiseAdaptive
from maskvr_ds.optim.stable_adamw import StableAdamW
from maskvr_ds.runtime import distributed

import_muon()


def create_engine(
    encoder: PreTrainedConfig,
    deepspeed_config: dict[str, Any],
    *,
    model: ModelConfig,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    accumulation: int,
    seed: int,
    row_length: int | None = None,
    separator: int | None = None,
    late: LateMasks | None = None,
    initial: InitialWeights | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Build model, optimizer and engine. Collective: call on all ranks.

    deepspeed_config: as returned by `read_deepspeed_config`. accumulation: micro-batches per step and rank.
    seed: of the random initial weights, which `initial` (a pretrained model) replaces. row_length: positions of the
    rows that will be trained, for which rank 0 checks the model (`check_model`); None: no check. separator: id of the
    token that ends a document, to attend within documents; None: within rows. late: late mask tokens.

    Raises ConfigError on all ranks if this machine does not support the precision, the architecture not what is asked
    of it, or the weights do not fit the model, RuntimeError if DeepSpeed is not the one that the patches expect.
    """
    check_deepspeed()
    distributed.run_collectively(lambda: check_device(deepspeed_config))
    if optimizer.fused:
        distributed.run_collectively(lambda: check_fused(deepspeed_config))
    # Silences DeepSpeed's warnings that the optimizer is not one of its own.
    logger.setLevel(logging.ERROR)
    torch.manual_seed(hashing.fold(seed) >> 1)
    module = distributed.run_collectively(
        lambda: MaskedLanguageModel(
            encoder, activation_checkpointing=model.activation_checkpointing, separator=separator, late=late
        )
    )
    if row_length is not None:
        dtype, device = model_dtype(deepspeed_config), distributed.device()
        _freeze(module, distributed.run_on_rank0(lambda: check_model(module, row_length, dtype, device)))
    distributed.run_collectively(lambda: _replace_layer_norms(module, model, deepspeed_config, accumulation))
    if initial is not None:
        pretrained.load(module.mlm, initial)
    # DeepSpeed rounds the parameters before it copies them to the fp32 masters: restore the masters afterwards.
    exact = {}
    if initial is not None and model_dtype(deepspeed_config) != torch.float32:
        exact = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    groups = lamb.parameter_groups(module, optimizer.weight_decay)
    client = _own_optimizer(groups, optimizer)
    complete = complete_deepspeed_config(deepspeed_config, batch, optimizer, accumulation=accumulation)
    distributed.run_collectively(lambda: _check_build_locks(complete))
    with quiet_memory():
        engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, optimizer=client, config=complete)
    distributed.run_collectively(lambda: _check_dtype(engine, model_dtype(deepspeed_config)))
    check_buffers(engine.module)
    if client is None:
        distributed.run_collectively(lambda: undo_initial_step(engine))
    if exact:
        distributed.run_collectively(lambda: set_masters(engine, exact))
    if client is not None:
        distributed.run_collectively(lambda: lamb.bind(engine))
    if loss_scale(engine) is not None:
        hold_loss_scale(engine.optimizer)
    distributed.run_collectively(lambda: streamline(engine))
    return engine


def _replace_layer_norms(
    module: MaskedLanguageModel, model: ModelConfig, deepspeed_config: dict[str, Any], accumulation: int
) -> None:
    """Raises ConfigError for what statistics of the batch do not work with."""
    if model.uses_statistics:
        if (dtype := model_dtype(deepspeed_config)) != torch.float32 or zero_stage(deepspeed_config) == 3:
            found = "ZeRO 3" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"model.normalization {model.normalization} keeps running statistics in each rank's module, in fp32, "
                f"and deepspeed says {found}; choose fp32 at ZeRO 0, 1 or 2 (deepspeed: zero1_fp32)"
            )
        if accumulation > 1:
            raise ConfigError(
                f"model.normalization {model.normalization}: the statistics must be those of the global batch, and "
                f"each rank takes it in {accumulation} micro-batches; set batch.micro_size to batch.global_size ÷ ranks"
            )
    replace_layer_norms(module.mlm, model.normalization, model.gamma_decay)


def _check_build_locks(config: dict[str, Any]) -> None:
    """Raise BuildLockError if DeepSpeed would wait for ever for its Adam, which it compiles at first use."""
    if not (own := config.get("optimizer")) or own["params"]["torch_adam"]:
        return
    check_build_lock("fused_adam" if offload_device(config) == "none" else "cpu_adam")


def _freeze(module: MaskedLanguageModel, names: list[str]) -> None:
    """Freeze parameters that get no gradient: decay alone would shrink them to 0."""
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    if names:
        logging.getLogger(__name__).warning(
            "%d parameters get no gradient from masked tokens and stay as they are: %s", len(names), ", ".join(names)
        )


def _own_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> LayerwiseAdaptive | None:
    """The optimizer to pass to DeepSpeed; None for AdamW, which DeepSpeed constructs (ds_config.py)."""
    if config.name == "lamb":
        variant = config.lamb_variant()
        return lamb.Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps, variant=variant, fused=config.fused)
    if config.name == "stable_adamw":
        return StableAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return None


def _check_dtype(engine: deepspeed.DeepSpeedEngine, expected: torch.dtype) -> None:
    """Raise ConfigError if DeepSpeed and ds_config.py read different precisions from the configuration."""
    if (found := next(engine.module.parameters()).dtype) != expected:
        raise ConfigError(f"DeepSpeed made a {found} model from a configuration that asks for {expected}")


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Factor applied to the loss in the next backward pass in fp16; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def replicated_grad_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | None:
    """Global L2 norm of the averaged gradients (scalar) at ZeRO 0 in fp32, where all ranks hold them and DeepSpeed
    computes no norm; None otherwise, when `step_and_norm` gets it from DeepSpeed."""
    if engine.optimizer is not engine.basic_optimizer:
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def step_and_norm(engine: deepspeed.DeepSpeedEngine, norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
    """Call engine.step() at the end of an accumulation; returns the global L2 gradient norm before clipping.

    norm: from `replicated_grad_norm`. In fp16 the norm is that of the unscaled gradients; if they overflow it is inf,
    DeepSpeed skips the update and the loss scale is halved. Raises FloatingPointError on all ranks if the scale is at
    its minimum already.
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
            f"gradients overflow at loss scale {scale:g}, the minimum (fp16.loss_scale, fp16.min_loss_scale); "
            "resume from the last checkpoint with a lower optimizer.lr, or in bf16"
        )
    update_loss_scale(engine.optimizer, overflow)
    return norm
