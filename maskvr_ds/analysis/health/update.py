"""The last update of each tensor, from the moments that a checkpoint stores.

DeepSpeed's converter assembles the moments of all ranks, also of ZeRO 3, in a temporary folder. With the moments m, v
of the checkpoint's step, u = m̂ / (√v̂ + ε) + λ w; w is that after the update instead of before it, which changes u by
λ times the learning rate. A tensor's relative update is η ‖u‖ / ‖w‖, for LAMB η ratio ‖u‖ / ‖w‖.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from maskvr_ds.checkpoint import reshard
from maskvr_ds.config.training import OptimizerConfig
from maskvr_ds.run_folder.checkpoints import CheckpointState, read_manifest


def relative_updates(folder: Path, state: CheckpointState, lr: float) -> dict[str, float]:
    """Tensor -> ‖Δw‖ / ‖w‖ of the last update; without tensors whose norm is 0.

    folder: a verified checkpoint; lr: learning rate of its step. Raises CheckpointError if DeepSpeed's files cannot be
    converted.
    """
    optimizer = OptimizerConfig.model_validate({**state.identity["optimizer"], "lr": max(lr, 1e-30)})
    found = {}
    with tempfile.TemporaryDirectory(prefix="maskvr-") as scratch:
        (Path(scratch) / "checkpoints").mkdir()
        universal = reshard.convert(Path(scratch), folder, state, state)
        step = int(read_manifest(universal)["step"])
        with safe_open(universal / reshard.TENSORS, framework="pt") as file:
            names = [key.removeprefix("exp_avg/") for key in file.keys() if key.startswith("exp_avg/")]  # noqa: SIM118
            for name in names:
                w, m, v = (file.get_tensor(f"{kind}/{name}") for kind in ("fp32", "exp_avg", "exp_avg_sq"))
                if (size := w.norm().item()) > 0:
                    found[name] = _update(w, m, v, step, optimizer, lr) / size
    return found


def _update(
    w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int, optimizer: OptimizerConfig, lr: float
) -> float:
    """‖Δw‖ of one tensor."""
    beta1, beta2 = optimizer.betas
    first, second = 1 - beta1**step, 1 - beta2**step
    decay = optimizer.weight_decay if w.dim() > 1 else 0.0
    variant: Any = optimizer.lamb_variant() if optimizer.name == "lamb" else None
    if variant is not None and variant.bias_correction != "moments":
        if variant.bias_correction == "rate":
            lr *= math.sqrt(second) / first
        first = second = 1.0
    u = m / first / ((v / second).sqrt() + optimizer.eps) + decay * w
    size = u.norm().item()
    ratio = 1.0
    if variant is not None and size > 0 and (decay or variant.adapt_undecayed):
        ratio = min(max(w.norm().item() / size, variant.min_ratio), variant.max_ratio)
    return lr * ratio * size
