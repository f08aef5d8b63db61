"""Time of a step by its parts. Loads no torch.

docs/explanation/planning.md states every constant with its origin: "assumed" ones are guesses that `--measured`
replaces by two factors.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from maskvr_ds.config import MaskingConfig
from maskvr_ds.planning.communication import collectives, seconds
from maskvr_ds.planning.hardware import Cluster, Gpu
from maskvr_ds.planning.memory import Pass
from maskvr_ds.planning.sizes import EncoderSizes
from maskvr_ds.planning.zero import Zero

# Share of its nominal bandwidth that a kernel reaches on the GPU's memory (assumed).
_STREAM = 0.85
# Bytes per logit that the head's loss moves, forward and backward (assumed).
_PER_LOGIT = 30
# Bytes/s of a node's memory, shared by its GPUs, and of a GPU's PCIe link, for offloaded optimizers (assumed).
_HOST_STREAM, _PCIE = 200e9, 25e9
# Seconds of the host per kernel launch: 2,274 launches of conditional Poisson sampling took 30 ms on an H100.
LAUNCH = 13e-6
# Launches per micro-batch: masks by strategy, digests and counters; of the passes per layer, and besides.
_MASKS = {"uniform": 91.0, "fully_explored": 119.0, "frequency": 138.0, "whole_word": 158.0, "span": 221.0}
_MASKS["mapnet"] = 179.0 + 354.0
_DIGESTS, _PER_LAYER, _AROUND_LAYERS = 99, 50, 50
# What the host takes for the passes at stage 3, whose hooks gather and release parameters, in units of stage 1:
# measured on a CPU (docs/results/plan).
STAGE_3_HOST = 5
# Bytes that the update moves per parameter, by optimizer, and whether it is fused into kernels. StableAdamW's are
# counted from its list operations, not measured.
_UPDATE = {("lamb", False): 108, ("lamb", True): 42, ("adamw", True): 28, ("stable_adamw", False): 148}
# Then: norm 4, clipping 8, zeroing 4, copy to the model 6; the same if LAMB's kernels clip and copy (BF16_Optimizer);
# flattening for the reduction; summing gradients in fp32, of the first micro-batch and of each later one.
_REST, _REST_OF_KERNELS, _FLATTEN, _FIRST_SUM, _LATER_SUM = 22, 10, 24, 6, 18


@dataclass(frozen=True)
class Calibration:
    """Factors of the predicted times, of what a GPU computes and of what its host takes for launches; and of the memory
    of activations."""

    compute: float = 1.0
    host: float = 1.0
    activations: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, without what overlaps. data: masks, digests, launches that the GPU waits for."""

    data: float
    forward_backward: float
    reduction: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def mean_time(times: Sequence[StepTime], shares: Sequence[float]) -> StepTime:
    """The mean over steps of several kinds. shares: of the steps, by kind."""
    rows = [asdict(time) for time in times]
    return StepTime(**{part: sum(s * row[part] for s, row in zip(shares, rows, strict=True)) for part in rows[0]})


def _products_share(hidden: int) -> float:
    """Share of the rate of large matrix products that an encoder's reach, by hidden size (assumed)."""
    return 0.85 * hidden / (hidden + 160)


def _attention_share(length: float) -> float:
    """Share of that rate that fused attention reaches: 15% at 128 positions, 28% at 512, at most half (assumed).

    length: of what attends to itself: a row, or the mean over tokens of the lengths of their documents.
    """
    return min(0.5, max(0.05, 0.15 + 0.065 * math.log2(length / 128)))


def pass_seconds(sizes: EncoderSizes, gpu: Gpu, element: int, work: Pass) -> float:
    """Seconds in which a GPU computes one micro-batch forward and backward."""
    B, L, K = work.micro, work.length, work.predictions
    rate, stream = gpu.product_rate(element), gpu.bandwidth * _STREAM
    again = 1 + work.recomputed(sizes.layers) / (3 * sizes.layers)
    # Without documents, whose kernel skips what is outside of a window, all pairs are computed and masked.
    pairs = sizes.attended(L, work.pairs, work.late, windows=work.pairs is not None)
    positions = sizes.positions(L, work.late)
    products = 3 * B * (positions * sizes.token_flops * again + K * sizes.prediction_flops)
    attention = 3 * B * pairs * sizes.pair_flops * again
    # Fused attention computes QKᵀ once more in its backward pass: 7 products of matrices for 6.
    return (
        products / (rate * _products_share(sizes.hidden))
        + attention * 7 / 6 / (rate * _attention_share(pairs / positions))
        + B * positions * sizes.layers * sizes.moved * element * again / stream
        + B * K * sizes.vocabulary * _PER_LOGIT / stream
    )


def update_bytes(sizes: EncoderSizes, zero: Zero, work: Pass, optimizer: str, *, ranks: int, fused: bool) -> float:
    """Bytes that the sums of gradients, their norm and clipping, the update and the copy to the model move."""
    P = sizes.total
    share = P / ranks if zero.stage else P
    summed = 0 if zero.element == zero.accumulated else (_FIRST_SUM + _LATER_SUM * (work.accumulation - 1)) * P
    flattened = _FLATTEN * P if zero.flattens(ranks) else 0
    rest = _REST_OF_KERNELS if fused and optimizer == "lamb" and zero.flat_gradients else _REST
    return summed + flattened + (_UPDATE[optimizer, fused] + rest) * share


def update_seconds(moved: float, sizes: EncoderSizes, zero: Zero, cluster: Cluster) -> float:
    """Seconds of the update; that of an offloaded optimizer runs at the speed of the host's memory."""
    if not zero.offload:
        return moved / (cluster.gpu.bandwidth * _STREAM)
    carried = (zero.accumulated + zero.element) * sizes.total / cluster.ranks
    return moved / (_HOST_STREAM / cluster.gpus_per_node) + carried / _PCIE


def update_launches(sizes: EncoderSizes, zero: Zero) -> float:
    """Launches of norm, clipping and update, counted on a CPU (tests/distributed/test_kernel_counts.py)."""
    if zero.flat_gradients:
        return 130
    per_tensor = {0: 19.0 if zero.element == 2 else 1.0, 1: 2.5, 2: 2.5, 3: 3.5}[zero.stage]
    return 60 + per_tensor * sizes.tensors


def mask_launches(masking: MaskingConfig) -> float:
    """Launches that draw the masks of one micro-batch, MAPNet's learning included (uniform masks for `auto`)."""
    found = _MASKS.get(masking.strategy, _MASKS["uniform"])
    settings = getattr(masking, masking.strategy, None)
    if getattr(settings, "sampler", None) == "conditional_poisson":
        found += 3  # Triton's kernels; without Triton about 18 for each position
    return found


def step_time(
    sizes: EncoderSizes,
    zero: Zero,
    work: Pass,
    cluster: Cluster,
    *,
    optimizer: str,
    fused: bool,
    calibration: Calibration,
    masks: float = _MASKS["uniform"],
) -> StepTime:
    """Seconds of a step on a cluster. masks: launches that draw the masks of a micro-batch.

    Within passes and update, the host launches while the GPU computes, and the slower one counts; the GPU waits for
    masks. Raises ConfigError if a bandwidth between nodes is needed and not known.
    """
    A, compute, host = work.accumulation, calibration.compute, calibration.host * LAUNCH
    launches = (_PER_LAYER * sizes.layers + _AROUND_LAYERS) * (1 + 0.3 * work.recomputed(sizes.layers) / sizes.layers)
    if zero.stage == 3:
        launches *= STAGE_3_HOST
    passes = A * max(pass_seconds(sizes, cluster.gpu, zero.element, work) * compute, launches * host)
    moved = update_bytes(sizes, zero, work, optimizer, ranks=cluster.ranks, fused=fused)
    update = update_seconds(moved, sizes, zero, cluster) * compute
    return StepTime(
        data=A * (masks + _DIGESTS) * host,
        forward_backward=passes,
        reduction=seconds(collectives(sizes, zero, A), cluster, passes),
        optimizer=max(update, update_launches(sizes, zero) * host),
    )
