"""The only file that calls deepspeed.initialize.

ds_configs/*.json own ZeRO stage, precision, communication and offload; RunConfig owns what OWNED lists, which
stands as "auto" in the JSON or not at all.
"""

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from transformers import BertConfig

from maskvr_ds import hashing
from maskvr_ds.config import BatchConfig, ConfigError, ModelConfig, OptimizerConfig
from maskvr_ds.engine.deepspeed_patches import check_deepspeed, hold_loss_scale, import_muon, update_loss_scale
from maskvr_ds.engine.ds_config import check_device, complete_deepspeed_config, model_dtype
from maskvr_ds.engine.master_weights import set_masters
from maskvr_ds.models import pretrained
from maskvr_ds.models.bert import MaskedLanguageModel
from maskvr_ds.models.pretrained import InitialWeights
from maskvr_ds.optim import lamb
from maskvr_ds.runtime import distributed

import_muon()


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
    check_deepspeed()
    distributed.run_collectively(lambda: check_device(deepspeed_config))
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
    distributed.run_collectively(lambda: _check_dtype(engine, model_dtype(deepspeed_config)))
    if exact:
        distributed.run_collectively(lambda: set_masters(engine, exact))
    if client is not None:
        distributed.run_collectively(lambda: lamb.bind(engine))
    if loss_scale(engine) is not None:
        hold_loss_scale(engine.optimizer)
    return engine


def _check_dtype(engine: deepspeed.DeepSpeedEngine, expected: torch.dtype) -> None:
    """Raise ConfigError where DeepSpeed has read the precision in another way than this module."""
    if (found := next(engine.module.parameters()).dtype) != expected:
        raise ConfigError(f"DeepSpeed has made a model of {found} of a configuration that asks for {expected}")


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """What the loss is multiplied by before the next backward pass in fp16; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


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
    update_loss_scale(engine.optimizer, overflow)
    return norm
