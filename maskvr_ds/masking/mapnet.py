"""MAPNet, the mask proposal network (arXiv 2008.05333): unmasked tokens → inclusion probabilities, and its objectives.

B sequences, L positions, K predictions a sequence, D hidden, V vocabulary. n and k: maskable positions and predictions
of a row.

    π_prop ∝ exp(ŝ), capped at 1, Σ π_prop = k;    π = (1 − λ) π_prop + λ k/n;    u = (k/n) / π ≤ 1/λ

ŝ_i is the network's score, a log-norm. w are the Horvitz–Thompson weights of the masks that were drawn, whatever
estimator the training loss has: u for masks drawn by π (proposer.py), 1 for uniform ones. s_i = ‖∂ℓ_i/∂h_i‖ is the
target (gradient_norm.py), s̄ its mean over the cluster's global batch.

Differences from the paper: it trains the proposal through a bound on the variance of the whole mask's gradient; here
the second moment of the single prediction's gradient norm is the objective itself (the norm: Katharopoulos & Fleuret
2018, arXiv 1803.00942), and the floor λ bounds the weights. No collectives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

_HEAD_SIZE = 32
# A prediction that is certain has no gradient; its logarithm would outweigh all others.
_SMALLEST_RATIO = 1e-3


class Layer(nn.Module):
    """Pre-LayerNorm transformer layer with full attention, no dropout."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.intermediate = nn.Linear(hidden, 2 * hidden)
        self.output = nn.Linear(2 * hidden, hidden)

    def forward(self, x: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """x float32 [B, L, D], visible bool [B, 1, 1, L] or None → float32 [B, L, D]."""
        B, L, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, L, 3, D // _HEAD_SIZE, _HEAD_SIZE).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attention_output(attended.transpose(1, 2).reshape(B, L, D))
        return x + self.output(F.gelu(self.intermediate(self.norm(x))))


class MapNet(nn.Module):
    """Embeddings, `layers` layers, one score a position. The scores begin at 0: the proposal at uniform.

    How surprising a token is where it stands is most of what there is to learn. So before the layers every token e is
    confronted with c, what the `reach` tokens on either side of it, itself left out, lead one to expect: [e, c, e · c].
    """

    def __init__(self, *, vocab_size: int, max_length: int, layers: int, hidden: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.tokens = nn.Embedding(vocab_size, hidden)
        self.positions = nn.Embedding(max_length, hidden)
        self.expected = nn.Linear(2 * reach * hidden, hidden)
        self.confront = nn.Linear(3 * hidden, hidden)
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.score = nn.Linear(hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=hidden**-0.5)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """ŝ: unmasked input_ids int64 [B, L], attention_mask bool [B, L] or None → float32 [B, L]."""
        r, e = self.reach, self.tokens(input_ids)
        if attention_mask is not None:
            # What pads a row is as what lies beyond its ends: scores do not depend on how far it is padded.
            e = e * attention_mask[:, :, None]
        windows = F.pad(e, (0, 0, r, r)).unfold(1, 2 * r + 1, 1)  # [B, L, D, 2r + 1]
        c = F.gelu(self.expected(torch.cat([windows[..., :r], windows[..., r + 1 :]], -1).flatten(2)))
        x = self.confront(torch.cat([e, c, e * c], -1)) + self.positions.weight[: input_ids.shape[1]]
        visible = None if attention_mask is None else attention_mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, visible)
        return self.score(self.norm(x)).squeeze(-1)


def flops_per_sequence(*, layers: int, hidden: int, reach: int, sequence_length: int) -> float:
    """Floating-point operations that MAPNet adds to a sequence: a forward pass to propose, a forward and a backward
    pass (twice a forward one) to learn. Matrix products only, a multiply-add counting as two (as model.py counts)."""
    L, D = sequence_length, hidden
    return 4.0 * (2 * (2 * reach + 3) * L * D * D + layers * (16 * L * D * D + 4 * L * L * D))


def inclusion_from_scores(
    scores: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor, floor: float
) -> torch.Tensor:
    """π = (1 − λ) min(1, c exp(ŝ)) + λ k/n with c such that Σ π = k, exactly and differentiably.

    Capping the m largest leaves k − m for the others in proportion; m is the least for which none of these exceeds 1,
    found for all rows at once by one sort. In logarithms: no score over- or underflows.

    `pareto.proposal_to_inclusion` is the same map for fixed scores, counted in integers: there no bit depends on the
    batch's layout, and nothing has a gradient.

    Args:
        scores: ŝ, float [B, L], finite on maskable positions.
        maskable: bool [B, L].
        counts: k, int64 [B], 0 ≤ k ≤ n.
        floor: λ in (0, 1].

    Returns: float64 [B, L] in (0, 1], 1 where not maskable (never used there).
    """
    n, k = maskable.sum(1, keepdim=True), counts[:, None].double()
    # Rows without a maskable position stand for themselves: log of nothing would be NaN.
    scores = scores.double().masked_fill(~(maskable | (n == 0)), -torch.inf)
    with torch.no_grad():
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        rest = ordered.flip(1).logcumsumexp(1).flip(1)
        ranks = torch.arange(scores.shape[1], device=scores.device)
        fits = (k - ranks).clamp(min=0).log() + ordered <= rest
        m = fits.int().argmax(1, keepdim=True)
        capped = torch.zeros_like(maskable).scatter_(1, order, ranks < m)
    shares = scores.masked_fill(capped, -torch.inf).log_softmax(1).exp()
    proposed = torch.where(capped, 1.0, ((k - m) * shares).clamp(max=1.0))
    return torch.where(maskable, (1 - floor) * proposed + floor * k / n.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Objective:
    """A loss to be summed over the predictions of the global batch and divided by their number.

    loss(scores ŝ, w, u, s, s̄ of the last step), all float [N] but the last, s > 0 where w > 0 → scalar, Σ over N.
    degree: the sum is to be divided by this power of s̄; it is homogeneous, so the summed gradient may be, after the
    reduction that brings s̄.
    """

    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    degree: int


def variance(
    scores: torch.Tensor, w: torch.Tensor, u: torch.Tensor, s: torch.Tensor, s_mean: torch.Tensor
) -> torch.Tensor:
    """Σ_{i∈M} w_i u_i(φ) s_i²: the mask variance up to what φ does not change.

    E_M Σ w_i u_i s_i² = Σ_i (k/n)² E s_i² / π_i(φ) over all maskable positions, whichever proposal drew M: the second
    moment of a prediction's weighted gradient norm under the network's proposal. Least at π ∝ √E s².
    """
    return (w * u * s.square()).sum()


def regression(
    scores: torch.Tensor, w: torch.Tensor, u: torch.Tensor, s: torch.Tensor, s_mean: torch.Tensor
) -> torch.Tensor:
    """Σ_{i∈M} w_i (ŝ_i − log(s_i/s̄))². s̄ of the step before: π does not feel a common shift of the scores."""
    target = (s / s_mean).clamp(min=_SMALLEST_RATIO).log()
    return (w * (scores - target).square()).sum()


OBJECTIVES: dict[str, Objective] = {"variance": Objective(variance, 2), "regression": Objective(regression, 0)}
