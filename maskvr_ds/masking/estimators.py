"""Estimators: importance weights for the losses of a drawn mask, collected in the table ESTIMATORS.

B sequences, L positions, K predictions per sequence at most. A row has n maskable positions; the mask M is a set of k
of them, drawn from a design q with inclusion probabilities π_i = P(i ∈ M). p is the uniform design: every set of k
has probability 1/C(n, k). ℓ_i(M) is the loss of the prediction at i when M is masked: it depends on the other
members of M through the context. The loss of a row is (1/k) Σ_{i∈M} w_i ℓ_i(M); E_q denotes expectation over M.

                     estimand of the row's loss                             bias   weights of a row
  horvitz_thompson   (1/n) Σ_i E_q[ℓ_i(M) | i ∈ M]: contexts as q has them  none   differ; Σ w = k only on average
  hajek              as horvitz_thompson                                    O(1/k) differ; Σ w = k
  whole_mask         E_p[(1/k) Σ_{i∈M} ℓ_i(M)]: contexts as uniform masks   none   all equal

For uniform masks all weights are 1 under each estimator. Sources: Horvitz & Thompson 1952; Hájek 1971; whole_mask is
plain importance sampling of masks, the estimator of MAPNet's theorem (arXiv 2008.05333).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# In float32 no weight of a used slot may become 0, which marks an unused slot.
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Draw:
    """B masks and the known properties of their sampling design.

    positions: int64 [B, K], used: bool [B, K]: the mask of a row is positions[used].
    n: int64 [B], numbers of maskable positions.
    counts: int64 [B], k: numbers of used slots.
    inclusion: float64 [B, L] or [B, 1], π of the design. The proofs require the exact π, which
        ConditionalPoisson.inclusion() gives; under Pareto sampling it is the requested π, which is approximate.
    log_probability: float64 [B], log q(M); None if the sampler does not know it (Pareto sampling).
    """

    positions: torch.Tensor
    used: torch.Tensor
    n: torch.Tensor
    counts: torch.Tensor
    inclusion: torch.Tensor
    log_probability: torch.Tensor | None = None


def horvitz_thompson(draw: Draw) -> torch.Tensor:
    """w_i = (k/n) / π_i.

    Unbiased for (1/n) Σ_i E_q[ℓ_i(M) | i ∈ M]: all positions have equal weight, and the loss of each is its mean over
    the contexts that the design gives it. Hence unbiased for (1/n) Σ_i ℓ_i if the loss of a prediction does not depend
    on the other masked positions. If it does, not unbiased for the loss under uniform masks: the joint distribution of
    masked positions is still q. π ≥ λ · k/n bounds w by 1/λ.
    """
    share = (draw.counts.double() / draw.n.clamp(min=1))[:, None]
    return torch.where(draw.used, share / _at_predictions(draw), 0.0)


def hajek(draw: Draw) -> torch.Tensor:
    """w_i = k · (1/π_i) / Σ_{j∈M} 1/π_j: Horvitz–Thompson weights divided by their mean within the row.

    Has the estimand of horvitz_thompson. Biased: with R the row's loss and D = (1/n) Σ_{j∈M} 1/π_j, E[D] = 1, the bias
    is −Cov(R, D), of order 1/k; as k grows it vanishes faster than the standard error, O(1/√k). In return, a constant
    added to all losses changes the row's loss by exactly that constant for every mask, whereas the random Σ w of
    Horvitz–Thompson adds noise in proportion to the mean loss.

    Normalised within a row, not over the batch: a row's weights depend on its mask alone (not on rank, world size,
    accumulation or other rows) and need no reduction over ranks. The price: the bias is reduced only by more
    predictions per row, not by more rows.
    """
    inverse = torch.where(draw.used, 1 / _at_predictions(draw), 0.0)
    # Slot by slot: the summation order of sum() depends on the batch layout.
    total = torch.zeros_like(inverse[:, 0])
    for slot in inverse.unbind(1):
        total = total + slot
    # Rows without predictions have a total of 0, and no used slot.
    scale = draw.counts / torch.where(draw.counts > 0, total, 1.0)
    return inverse * scale[:, None]


def whole_mask(draw: Draw) -> torch.Tensor:
    """w = p(M) / q(M), the same for all predictions of a row.

    Unbiased for E_p[f(M)] of any function f of the mask, p uniform over the sets of k: also for the distribution of a
    prediction's *context*. Needs q(M) > 0 wherever p(M) > 0, hence π > 0 on all maskable positions. Its variance is
    that of a product of k factors, E_q[w²] = e_k(o) · e_k(1/o) / C(n, k)², exponential in k. At n = 126, k = 19 and
    odds exp(s · normal) its median is 1.17 for s = 0.1, 4.2 for s = 0.3 and 4·10^6 for s = 1 (mean square of
    Horvitz–Thompson: 1.007, 1.07, 2.1): use it only for short rows or proposals close to uniform. A floor on π bounds
    the factors, not w. Exact to about 1e-12 relative; the last bit of the weights may depend on the batch layout
    (logarithms), the masks never do.

    Raises ValueError if the sampler does not know log q(M).
    """
    if draw.log_probability is None:
        raise ValueError(
            "estimator 'whole_mask' needs the probability of each mask, which sampler 'pareto' does not provide; use "
            "sampler 'conditional_poisson', or estimator 'horvitz_thompson' or 'hajek'"
        )
    n, k = draw.n.double(), draw.counts.double()
    log_sets = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    weights = torch.exp(-log_sets - draw.log_probability).clamp(min=_SMALLEST)
    return torch.where(draw.used, weights[:, None], 0.0)


def _at_predictions(draw: Draw) -> torch.Tensor:
    """π at the predictions: float64 [B, K]; 1 in unused slots, whose positions may have π = 0."""
    length = draw.inclusion.shape[1]
    inclusion = draw.inclusion if length == 1 else draw.inclusion.gather(1, draw.positions)
    return torch.where(draw.used, inclusion, 1.0)


# estimator(draw) → weights float64 [B, K], 0 in unused slots, positive in used ones; MaskedBatch stores float32.
Estimator = Callable[[Draw], torch.Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "horvitz_thompson": horvitz_thompson,
    "hajek": hajek,
    "whole_mask": whole_mask,
}
