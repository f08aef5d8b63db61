"""Memory of a GPU, from sizes, ZeRO stage and micro-batch. Loads no torch.

Every moment of a step at which memory can be largest is added up separately: forward and backward passes, the reduction
of gradients, the update. The peak is that of the largest moment. docs/explanation/planning.md derives the terms.
"""

from dataclasses import astuple, dataclass, replace

from maskvr_ds.planning.sizes import EncoderSizes
from maskvr_ds.planning.zero import Zero

# Elements of fp32 to which BF16_Optimizer's gradients of later micro-batches are widened at a time (streamline.py).
_WIDENED = 1 << 25
# Bytes per logit at the start of the backward pass: log-softmax, and the gradients of its output and its input, fp32.
_PER_LOGIT = 12


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment of a step that takes most. buffers: what reductions and update need meanwhile."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


@dataclass(frozen=True)
class Pass:
    """What a rank computes at a time.

    length, predictions: L and K. micro: sequences per forward pass. accumulation: passes per step. checkpointing:
    activations are recomputed, of all layers or of so many, the lowest. pairs: ordered pairs of positions per sequence
    for which attention is computed; None: all, L². late: as for EncoderSizes.positions. on_cpu: PyTorch's kernels for
    CPUs: dropout masks in the precision of the model, attention not fused if it has dropout, and only the used part of
    a buffer takes memory.
    """

    length: int
    predictions: int
    micro: int
    accumulation: int
    checkpointing: bool | int = False
    pairs: float | None = None
    on_cpu: bool = False
    late: tuple[int, int] = (0, 0)

    def recomputed(self, layers: int) -> int:
        """Of `layers`, those whose activations are recomputed."""
        return layers if self.checkpointing is True else min(layers, self.checkpointing)


def activations(sizes: EncoderSizes, element: int, work: Pass) -> float:
    """Bytes kept for the backward pass of one micro-batch, at its start."""
    mask = element if work.on_cpu else 1
    layer = sizes.saved * element + sizes.masked * mask
    if work.on_cpu and sizes.masked:
        # In fp32: softmax, dropout's mask and their product, per head and pair of positions; and Q, K, V.
        layer += 3 * sizes.heads * work.length * 4 + 3 * sizes.hidden * (4 - element)
    embedded = sizes.embedded * element + (sizes.masked / 2) * mask
    tokens, rows = work.micro * work.length, work.micro * work.predictions
    head = rows * (_PER_LOGIT * sizes.vocabulary + sizes.of_head * element)
    # Gradients of a layer's widest tensor and of its input.
    last = 2.0 * tokens * sizes.widest * element
    again = work.recomputed(sizes.layers)
    # Of recomputed layers their inputs; the others are the upper ones, whose activations are gone before one is
    # recomputed. If there are none, the logits are.
    layers = again * sizes.hidden * element + (sizes.layers - again) * layer
    if again == sizes.layers:
        last += tokens * layer
    in_layers = work.micro * sizes.positions(work.length, work.late)
    return tokens * embedded + in_layers * layers + max(head, last)


def memory(sizes: EncoderSizes, zero: Zero, work: Pass, *, ranks: int, fused: bool, factor: float = 1.0) -> Memory:
    """Peak memory of a GPU. fused: the optimizer needs no buffer for its update (LAMB's kernels, FusedAdam).
    factor: of the activations, measured."""
    P, e = sizes.total, zero.element
    share = P / ranks if zero.stage else P
    update = 0 if fused or zero.offload or _overwrites_gradients(zero, work) else 4 * share
    moments = 8 * share
    masters = 0.0 if zero.stage == 0 and e == 4 else 4 * share
    optimizer = 0.0 if zero.offload else moments + masters
    weights = e * (share if zero.stage == 3 else P)
    gradients = _gradients(sizes, zero, work, share, ranks)
    # The decoder's gradient is the first one of a backward pass; held ones are added to only after that.
    first = e * sizes.largest
    kept = factor * activations(sizes, e, work)
    in_pass = Memory(weights, gradients.held + first, optimizer, kept, gradients.allocated)
    of_reduction = Memory(weights, gradients.reduced, optimizer, 0.0, gradients.copies)
    of_update = Memory(weights, gradients.updating, optimizer, 0.0, update)
    return max(in_pass, of_reduction, of_update, key=lambda moment: moment.total)


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients and buffers. held, allocated: during a pass, before it has made gradients; reduced, copies: at
    the end of the reduction; updating: during the update."""

    held: float
    allocated: float
    reduced: float
    copies: float
    updating: float


def _overwrites_gradients(zero: Zero, work: Pass) -> bool:
    """Whether LAMB, on a CPU, keeps its update where the gradients were (engine/streamline.py)."""
    return work.on_cpu and (zero.stage in (1, 2) or (zero.stage == 0 and zero.element == 4))


def _gradients(sizes: EncoderSizes, zero: Zero, work: Pass, share: float, ranks: int) -> _Gradients:
    """share: elements of a rank's partition. One rank makes no copies for a reduction (engine/one_rank.py)."""
    P, e, a = sizes.total, zero.element, zero.accumulated
    later = work.accumulation > 1
    # At the end of a backward pass the token embeddings have a gradient as embeddings, one as decoder, and their sum.
    tied = 1.0 * e * sizes.largest
    if zero.holds_gradients(ranks):
        return _Gradients(4 * P, 0.0, 4 * P, 3 * tied, 4 * P)
    if zero.stage == 0:
        # Flattened for the reduction; in bf16 copied to fp32 for the update.
        flat = max(2 * tied, max(e, zero.communicated) * P if ranks > 1 else 0.0)
        return _Gradients(e * P if later else 0.0, 0.0, e * P, flat, (e + (4 if e == 2 else 0)) * P)
    if zero.flat_gradients:
        # The buffer of all gradients exists always; those of a pass are zeroed, not freed, before the next one.
        widened = 4.0 * min(P, max(sizes.largest, _WIDENED)) if later else 0.0
        held = 4.0 * P + (e * P if later else 0)
        flat = max(2 * tied, 4.0 * P if ranks > 1 else 0.0)
        return _Gradients(held, widened, (4 + e) * P, flat + widened, 4 * P)
    partition = 0.0 if zero.offload else 4 * share
    bucket = 1.0 * zero.buckets * zero.bucket * (a if zero.stage == 1 else e)
    # On a CPU, a buffer takes memory as it is filled.
    allocated, used = (0.0, min(bucket, e * P)) if work.on_cpu else (bucket, bucket)
    if zero.stage == 3:
        # All gathered parameters stay until the backward pass has used them.
        gathered = e * min(P, zero.live)
        return _Gradients(partition, allocated + gathered, partition, used + gathered, 2 * partition)
    held = 0.0 if not later else 1.0 * a * P if zero.stage == 1 else partition
    # Gradients move into the bucket, from there into the partition, and are flattened for the optimizer.
    moved = _Gradients(held, allocated, e * share + partition, used, partition)
    if zero.stage == 1 and a * P > e * share + partition and not work.on_cpu:
        return replace(moved, reduced=a * P)
    return moved
