"""One optimizer step: masks, micro-batches, reductions, update.

Collectives, over the world group: one all-reduce of int64 [6] (digests, predictions, skipped rows, ranks asked to
stop, ranks writing a checkpoint; [8] while shards are verified in the background: ranks still comparing, ranks that
found damage) before the first backward pass, one of float64 [1] (loss; [2] with the loss of sentence pairs) after the
last; DeepSpeed's gradient reduction; LAMB's norms; MAPNet's, if it proposes the masks (masking/proposer.py).
"""

from dataclasses import dataclass
from typing import Any

import torch

from maskvr_ds.config import Objectives
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.engine.engine import replicated_grad_norm, step_and_norm
from maskvr_ds.masking.masker import Masker, data_digest, mask_digest
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.models.losses import objective_losses
from maskvr_ds.reliability.divergence import Guard
from maskvr_ds.runtime import distributed

# Tokens masked at a time; in int64 a few buffers of 4 MiB each.
_TOKENS_AT_ONCE = 1 << 19
# The same for masks of the proposal network, which needs about 3 KB per token.
_PROPOSED_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over the global batch, still on the device.

    counters: int64 [4]: data_digest, mask_digest, predictions, rows without predictions. stop_requests: int64 [1],
    ranks that were asked to stop. writing_ranks: int64 [1], ranks writing a checkpoint. loss_sum: float64 [1],
    Σ w ℓ. grad_norm: L2 norm of the gradients before clipping. pair_loss: float64 [1], mean cross-entropy of the
    sentence pairs in nats; None if none are trained. verifying_ranks: int64 [2], ranks whose flags `verifying` were
    set; None without.
    """

    counters: torch.Tensor
    stop_requests: torch.Tensor
    writing_ranks: torch.Tensor
    loss_sum: torch.Tensor
    grad_norm: torch.Tensor | float
    pair_loss: torch.Tensor | None = None
    verifying_ranks: torch.Tensor | None = None


def run_step(
    engine: Any,
    masker: Masker,
    batch: TokenBatch,
    micro_size: int,
    proposer: Proposer | None = None,
    *,
    objectives: Objectives | None = None,
    guard: Guard | None = None,
    stop: bool = False,
    writing: bool = False,
    verifying: tuple[bool, bool] | None = None,
) -> StepResult:
    """One optimizer step on this rank's share of the global batch. Collective: call on all ranks.

    Only the guard makes the host wait for the device, once, for loss and gradient norm; except for ZeRO 1 in bf16,
    DeepSpeed's own step waits, too, for its overflow check. objectives: weights in the loss; None: masked tokens only.
    A batch that has pairs needs the weight of their objective. stop: whether this rank was asked to stop. writing:
    whether it is writing a checkpoint. verifying: `BackgroundVerification.flags`; None: not, on all ranks.
    """
    tokens = _TOKENS_AT_ONCE if proposer is None else _PROPOSED_AT_ONCE
    parts = list(batch.split(_rows_at_once(batch, micro_size, tokens)))
    masked_parts = [masker(part) for part in parts]
    flags = (stop, writing, *(verifying or ()))
    counters = torch.stack(
        [
            data_digest(batch),
            _total(mask_digest(part, masked) for part, masked in zip(parts, masked_parts, strict=True)),
            _total((masked.weights != 0).sum() for masked in masked_parts),
            _total((masked.weights == 0).all(1).sum() for masked in masked_parts),
            *(torch.full((), int(flag), device=batch.sample_ids.device) for flag in flags),
        ]
    )
    distributed.all_reduce_sum(counters)
    micro_batches = [list(masked.split(micro_size)) for masked in masked_parts]
    # DeepSpeed averages over micro-batches and ranks; this turns its mean of sums into Σ w ℓ / Σ k over the global
    # batch, however the predictions are spread over micro-batches and ranks.
    weights = objectives or Objectives()
    number = sum(map(len, micro_batches))
    passes = number * distributed.world_size()
    scale = weights.mlm * passes / counters[2].clamp(min=1).double()
    # Every row is a pair, and every rank has the same number of rows.
    pairs = len(batch.sample_ids) * distributed.world_size()
    pair_scale = weights.pair_weight * passes / pairs
    loss_sum = torch.zeros(1 if batch.pair_labels is None else 2, dtype=torch.float64, device=counters.device)
    if proposer is not None:
        # Of backward passes between two steps: compilation, probes.
        proposer.norms.clear()
    for part, masked_part, of_part in zip(parts, masked_parts, micro_batches, strict=True):
        for masked in of_part:
            loss, pair_loss = objective_losses(engine, masked)
            total = loss * scale.float()
            engine.backward(total if pair_loss is None else total + pair_loss * pair_scale)
            loss_sum += loss.detach() if pair_loss is None else torch.stack([loss.detach(), pair_loss.detach()])
            number -= 1
            if number:
                engine.step()
        if proposer is not None:
            proposer.observe(part, masker.maskable(part), masked_part)
    distributed.all_reduce_sum(loss_sum)
    mean_pair_loss = loss_sum[1:] / pairs if len(loss_sum) == 2 else None
    loss_sum = loss_sum[:1]
    norm = replicated_grad_norm(engine)
    if guard is not None and guard.enabled:
        mean = loss_sum / counters[2].clamp(min=1)
        if mean_pair_loss is not None:
            mean = weights.mlm * mean + weights.pair_weight * mean_pair_loss
        guard.before_update(mean.squeeze(), norm)
    return StepResult(
        counters=counters[:4],
        stop_requests=counters[4:5],
        writing_ranks=counters[5:6],
        loss_sum=loss_sum,
        grad_norm=step_and_norm(engine, norm),
        pair_loss=mean_pair_loss,
        verifying_ranks=None if verifying is None else counters[6:],
    )


def _rows_at_once(batch: TokenBatch, micro_size: int, tokens: int) -> int:
    """Rows to mask at a time, whole micro-batches of at most `tokens` tokens, at least one: masking launches as many
    kernels for few rows as for many."""
    return max(1, tokens // (batch.input_ids.shape[1] * micro_size)) * micro_size


def _total(terms: Any) -> torch.Tensor:
    return torch.stack(list(terms)).sum()
