"""`maskvr health --at-init CONFIG`: how signals propagate through a model with random weights, without training.

Rows of the table: the model as configured; other initializer ranges; a depth-scaled initialisation, in which the maps
that end each sublayer are divided by √(2N) for N layers (Radford et al. 2019, GPT-2, section 2.3); for BERT its
pre-LayerNorm counterpart, `roberta-prelayernorm` of transformers with the same sizes, and itself as the
post-LayerNorm one; and RMSNorm and batch normalisation in place of LayerNorm (models/normalization.py). All with the
same seed and the same rows, whose own statistics batch normalisation uses.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from maskvr_ds.analysis.health.checks import CHECKS
from maskvr_ds.analysis.health.probe import Signals, copy_for_analysis, layers_of, measure_signals
from maskvr_ds.config.model import Normalization
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.encoder import MaskedLanguageModel, build
from maskvr_ds.models.normalization import BatchNorm, replace_layer_norms

_FACTORS = (0.5, 1.0, 2.0, 5.0)
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "initializer_range"),
)
_OTHER_NORMS: dict[str, Normalization] = {"LayerNorm": "layer", "RMSNorm": "rms", "batch normalisation": "batch"}
_PRE_NORM = {"bert": "roberta-prelayernorm"}


@dataclass(frozen=True)
class Row:
    """A variant of the initialisation, and what it does to the signals. seed: of the weights."""

    name: str
    signals: Signals

    def figures(self) -> dict[str, float]:
        """activation, gradient: last over first layer. rms: smallest and largest rms singular value of the Jacobians.
        loss: nats per prediction. logit: largest attention logit."""
        s = self.signals
        rms = [j.rms for j in s.jacobians]
        return {
            "loss": s.loss,
            "activation_growth": s.activation[-1] / s.activation[0] if s.activation[0] else math.inf,
            "gradient_growth": s.gradient[0] / s.gradient[-1] if s.gradient[-1] else math.inf,
            "jacobian_low": min(rms),
            "jacobian_high": max(rms),
            "logit": max(s.logit, default=math.nan),
        }

    def findings(self, vocabulary: int) -> list[str]:
        """Names of the checks whose thresholds are exceeded."""
        f, limits = self.figures(), {name: check.thresholds for name, check in CHECKS.items()}
        start, bounds = limits["loss at the start"]["above_ln_vocabulary"], limits["layer Jacobians"]
        exceeded = {
            "loss at the start": not f["loss"] - math.log(vocabulary) <= start,
            "activations over depth": _exceeds(self.signals.activation, limits["activations over depth"]["factor"]),
            "gradients over depth": _exceeds(self.signals.gradient, limits["gradients over depth"]["factor"]),
            "layer Jacobians": not bounds["low"] <= f["jacobian_low"] <= f["jacobian_high"] <= bounds["high"],
            "attention logits": f["logit"] > limits["attention logits"]["largest"],
        }
        return [name for name, bad in exceeded.items() if bad]


def _exceeds(values: list[float], factor: float) -> bool:
    return not max(values) <= factor * min(values)


@dataclass(frozen=True)
class Variant:
    """scaled: whether depth-scaled. normalization: as `model.normalization`; population is batch before training."""

    name: str
    config: PreTrainedConfig
    scaled: bool = False
    normalization: Normalization = "layer"


def variants(config: PreTrainedConfig, normalization: Normalization = "layer") -> Iterator[Variant]:
    """normalization: of the model as configured, and of all variants that do not say otherwise."""
    given = float(getattr(config, "initializer_range", 0.02))
    for factor in _FACTORS:
        changed = deepcopy(config)
        changed.initializer_range = factor * given
        name = "as configured" if factor == 1 else f"initializer_range {factor * given:g}"
        yield Variant(name, changed, normalization=normalization)
    yield Variant("depth-scaled", deepcopy(config), scaled=True, normalization=normalization)
    if (other := _PRE_NORM.get(config.model_type)) is not None and other in CONFIG_MAPPING:
        sizes: dict[str, Any] = {key: getattr(config, key) for key in _SIZES}
        sizes["pad_token_id"] = config.pad_token_id
        # RoBERTa counts positions from pad_token_id + 1.
        sizes["max_position_embeddings"] += (config.pad_token_id or 0) + 1
        yield Variant(f"pre-LayerNorm ({other})", CONFIG_MAPPING[other](**sizes))
    for name, kind in _OTHER_NORMS.items():
        if kind != normalization and config.model_type in _PRE_NORM:
            yield Variant(name, deepcopy(config), normalization=kind)


def measure_initialisations(
    config: PreTrainedConfig, masked: MaskedBatch, *, seed: int, normalization: Normalization = "layer"
) -> list[Row]:
    """All variants on the same rows. Raises ValueError for architectures whose signals cannot be read."""
    return [_measure(variant, masked, seed) for variant in variants(config, normalization)]


def _measure(variant: Variant, masked: MaskedBatch, seed: int) -> Row:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy_for_analysis(build(variant.config))
    if variant.scaled:
        scale_by_depth(model)
    replace_layer_norms(model.mlm, variant.normalization)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            # With the rows' statistics: there are no running ones yet.
            module.train()
    return Row(variant.name, measure_signals(model.to(masked.input_ids.device), masked))


@torch.no_grad()
def scale_by_depth(model: MaskedLanguageModel) -> None:
    """Divide the maps that end each attention and feed-forward part by √(2N)."""
    layers = layers_of(model.mlm)
    depth = int(getattr(model.mlm.config, "num_hidden_layers", len(layers)))
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear) and _ends_a_sublayer(name):
                module.weight.div_(math.sqrt(2 * depth))


def _ends_a_sublayer(name: str) -> bool:
    """By the names that transformers gives to these maps."""
    ends = ("output.dense", "out_lin", "lin2", "Wo", "o_proj", "down_proj", "out_proj", "ffn_output", "attention.dense")
    return name.endswith((*ends, "attn.o"))


def table(rows: list[Row], vocabulary: int) -> str:
    """One line per variant."""
    heads = ("", "loss", "activation last/first", "gradient first/last", "layer Jacobian rms", "largest logit", "")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        f = row.figures()
        lines.append(
            (
                row.name,
                f"{f['loss']:.2f}",
                f"{f['activation_growth']:.3g}",
                f"{f['gradient_growth']:.3g}",
                f"{f['jacobian_low']:.2g} to {f['jacobian_high']:.2g}",
                f"{f['logit']:.3g}",
                ", ".join(row.findings(vocabulary)) or "ok",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
