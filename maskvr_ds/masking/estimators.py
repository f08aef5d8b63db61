"""Estimators: table of what the loss of a drawn mask is multiplied with, so that its mean is the one wanted.

B sequences, L positions, K predictions a sequence at most. A row has n maskable positions; the mask M is a set of k
of them, drawn from a design q with inclusion probabilities π_i = P(i ∈ M). p is the uniform design: every set of k
has probability 1/C(n, k). ℓ_i(M) is the loss of the prediction at i when M is masked: it depends on the other
members of M through the context. The loss of a row is (1/k) Σ_{i∈M} w_i ℓ_i(M), and E_q is its expectation.

                     what the row's loss estimates                          bias   weights of a row
  horvitz_thompson   (1/n) Σ_i E_q[ℓ_i(M) | i ∈ M]: contexts as q has them  none   differ; Σ w = k only on average
  hajek              the same                                               O(1/k) differ; Σ w = k
  whole_mask         E_p[(1/k) Σ_{i∈M} ℓ_i(M)]: contexts as uniform masks   none   all equal

Uniform masks make every weight 1 under each of them. Sources: Horvitz & Thompson 1952; Hájek 1971; whole_mask is
plain importance sampling of masks, the estimator of MAPNet's theorem (arXiv 2008.05333).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# In float32 no weight of a used slot may become 0: that is the mark of an unused one.
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Draw:
    """B masks and what is known of the design that they come from.

    positions: int64 [B, K], used: bool [B, K]: the mask of a row is positions[used].
    n: int64 [B], numbers of maskable positions.
    counts: int64 [B], k: numbers of used slots.
    inclusion: float64 [B, L] or [B, 1], π of the design that drew. ConditionalPoisson.inclusion() is exact, and
        exact is what the proofs ask for; under Pareto sampling π is what was asked for and approximate.
    log_probability: float64 [B], log q(M); None where the sampler does not know it (Pareto sampling).
    """

    positions: torch.Tensor
    used: torch.Tensor
    n: torch.Tensor
    counts: torch.Tensor
    inclusion: torch.Tensor
    log_probability: torch.Tensor | None = None


def horvitz_thompson(draw: Draw) -> torch.Tensor:
    """w_i = (k/n) / π_i.

    Unbiased for (1/n) Σ_i E_q[ℓ_i(M) | i ∈ M]: every position counts alike, and its loss is the mean over the
    contexts in which the design shows it. Hence unbiased for (1/n) Σ_i ℓ_i where the loss of a prediction does not
    depend on what else is masked. Not unbiased for the loss under uniform masks where it does: which positions
    are masked together still follows q. π ≥ λ · k/n bounds w by 1/λ.
    """
    share = (draw.counts.double() / draw.n.clamp(min=1))[:, None]
    return torch.where(draw.used, share / _at_predictions(draw), 0.0)


def hajek(draw: Draw) -> torch.Tensor:
    """w_i = k · (1/π_i) / Σ_{j∈M} 1/π_j: Horvitz–Thompson weights divided by their mean within the row.

    Estimates what horvitz_thompson does. Not unbiased: with R the row's loss and D = (1/n) Σ_{j∈M} 1/π_j, E[D] = 1,
    the bias is −Cov(R, D), of order 1/k; as k grows it vanishes faster than the standard error, O(1/√k). In return
    a constant added to all losses changes the loss by that constant, whatever the mask, where Horvitz–Thompson's
    Σ w adds noise in proportion to the mean loss.

    Within a row, not over the batch: so a row's weights depend on nothing but its mask (not on rank, world
    size, accumulation or neighbours), without a reduction over ranks. The price: more rows do not reduce the bias,
    only more predictions a row do.
    """
    inverse = torch.where(draw.used, 1 / _at_predictions(draw), 0.0)
    # Slot after slot: the order in which sum() adds depends on the batch's layout.
    total = torch.zeros_like(inverse[:, 0])
    for slot in inverse.unbind(1):
        total = total + slot
    # Rows without predictions have a total of 0, and no used slot.
    scale = draw.counts / torch.where(draw.counts > 0, total, 1.0)
    return inverse * scale[:, None]


def whole_mask(draw: Draw) -> torch.Tensor:
    """w = p(M) / q(M), the same for all predictions of a row.

    Unbiased for E_p[f(M)] of any function f of the mask, p uniform over the sets of k: also for what the *context* of
    a prediction looks like. Needs q(M) > 0 wherever p(M) > 0, hence π > 0 on all maskable positions. Its variance
    is that of a product of k factors, E_q[w²] = e_k(o) · e_k(1/o) / C(n, k)², exponential in k. At n = 126, k = 19 and
    odds exp(s · normal) its median is 1.17 for s = 0.1, 4.2 for s = 0.3 and 4·10^6 for s = 1 (Horvitz–Thompson's mean
    square: 1.007, 1.07, 2.1): short rows or proposals close to uniform only. A floor on π bounds the factors, not w.
    Exact to about 1e-12 relative, but its last bit may depend on the batch's layout (logarithms; the masks do not).

    Raises ValueError where the sampler does not know log q(M).
    """
    if draw.log_probability is None:
        raise ValueError(
            "masking.estimator is 'whole_mask', which needs the probability of each mask, and Pareto sampling does "
            "not have it; draw with conditional Poisson sampling, or use 'horvitz_thompson' or 'hajek'"
        )
    n, k = draw.n.double(), draw.counts.double()
    log_sets = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    weights = torch.exp(-log_sets - draw.log_probability).clamp(min=_SMALLEST)
    return torch.where(draw.used, weights[:, None], 0.0)


def _at_predictions(draw: Draw) -> torch.Tensor:
    """π at the predictions; 1 in unused slots, which may lie where π is 0: float64 [B, K]."""
    length = draw.inclusion.shape[1]
    inclusion = draw.inclusion if length == 1 else draw.inclusion.gather(1, draw.positions)
    return torch.where(draw.used, inclusion, 1.0)


# estimator(draw) → weights float64 [B, K], 0 in unused slots, positive in used ones; MaskedBatch wants float32.
Estimator = Callable[[Draw], torch.Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "horvitz_thompson": horvitz_thompson,
    "hajek": hajek,
    "whole_mask": whole_mask,
}
