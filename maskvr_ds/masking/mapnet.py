"""MAPNet, the mask proposal network (arXiv 2008.05333): unmasked tokens → inclusion probabilities, and its objectives.

B sequences, L positions, K predictions per sequence, D hidden, V vocabulary. n and k: maskable positions and
predictions of a row.

    π_prop ∝ exp(ŝ), capped at 1, Σ π_prop = k;    π = (1 − λ) π_prop + λ k/n;    u = (k/n) / π ≤ 1/λ

ŝ_i is the network's score, a log-norm. w are the Horvitz–Thompson weights of the drawn masks, independent of the
estimator of the training loss: u for masks drawn by π (proposer.py), 1 for uniform ones. s_i = ‖∂ℓ_i/∂h_i‖ is the
target (gradient_norms.py), s̄ its mean over the global batch.

Differences from the paper, which trains the proposal through a bound on the variance of the full mask's gradient: here
the objective is the second moment of a single prediction's gradient norm (the norm: Katharopoulos & Fleuret 2018,
arXiv 1803.00942), and the floor λ bounds the weights. No collectives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

_HEAD_SIZE = 32
# A certain prediction has zero gradient, whose logarithm would outweigh all others.
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


class Neighbours(nn.Linear):
    """Linear map of the `reach` vectors on either side of a position, without its own: [B, L, D] → [B, L, D].

    Places beyond the ends of a row are 0. weight [D, D · 2 reach]: of an input channel, first the neighbours on the
    left, in the order of the row.
    """

    def __init__(self, hidden: int, reach: int) -> None:
        super().__init__(2 * reach * hidden, hidden)
        self.reach = reach

    def forward(self, e: torch.Tensor) -> torch.Tensor:
        """e float32 [B, L, D] → float32 [B, L, D]."""
        D, r, L = self.out_features, self.reach, e.shape[1]
        weight = self.weight.view(D, D, 2 * r)
        if e.device.type == "cpu":
            # Half the time of forming the windows, although the centre's weights, 0, are multiplied too.
            kernel = F.pad(torch.stack(weight.split(r, 2), 2), (0, 1)).flatten(2)[..., : 2 * r + 1]
            return F.conv1d(e.transpose(1, 2), kernel, self.bias, padding=r).transpose(1, 2)
        # cuDNN's convolutions would be neither deterministic nor, by default, float32.
        padded = F.pad(e, (0, 0, r, r))
        windows = torch.cat([padded[:, place : place + L] for place in range(2 * r + 1) if place != r], -1)
        return F.linear(windows, weight.transpose(1, 2).flatten(1), self.bias)


class MapNet(nn.Module):
    """Embeddings, `layers` transformer layers, one score per position. Scores are 0 initially: a uniform proposal.

    A token's surprise in its local context is most of what can be learned. Therefore, before the layers, each token
    embedding e is combined with a prediction c from the `reach` tokens on either side: [e, c, e · c].
    """

    def __init__(self, *, vocab_size: int, max_length: int, layers: int, hidden: int, reach: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden)
        self.positions = nn.Embedding(max_length, hidden)
        self.expected = Neighbours(hidden, reach)
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
        e = self.tokens(input_ids)
        if attention_mask is not None:
            # Treat padding like positions beyond the ends of the row: scores do not depend on the padded length.
            e = e * attention_mask[:, :, None]
        c = F.gelu(self.expected(e))
        x = self.confront(torch.cat([e, c, e * c], -1)) + self.positions.weight[: input_ids.shape[1]]
        visible = None if attention_mask is None else attention_mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, visible)
        return self.score(self.norm(x)).squeeze(-1)


def flops_per_sequence(*, layers: int, hidden: int, reach: int, sequence_length: int) -> float:
    """FLOPs that MAPNet adds per sequence: a forward pass to propose, and a forward and a backward pass (twice the
    forward) to train. Matrix products only, a multiply-add counted as two, as in models/flops.py."""
    L, D = sequence_length, hidden
    return 4.0 * (2 * (2 * reach + 3) * L * D * D + layers * (16 * L * D * D + 4 * L * L * D))


def inclusion_from_scores(
    scores: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor, floor: float
) -> torch.Tensor:
    """π = (1 − λ) min(1, c exp(ŝ)) + λ k/n with c such that Σ π = k, exactly and differentiably.

    Capping the m largest leaves k − m to be shared in proportion by the others; m is the minimum for which none of
    these exceeds 1, found for all rows at once by one sort. Computed in logarithms: no score over- or underflows.

    `pareto.proposal_to_inclusion` is the same map for fixed scores in integer arithmetic: bit-identical in every batch
    layout, but not differentiable.

    Args:
        scores: ŝ, float [B, L], finite on maskable positions.
        maskable: bool [B, L].
        counts: k, int64 [B], 0 ≤ k ≤ n.
        floor: λ in (0, 1].

    Returns: float64 [B, L] in (0, 1]; 1 where not maskable (unused).
    """
    n, k = maskable.sum(1, keepdim=True), counts[:, None].double()
    # Rows without a maskable position keep their scores: a log-softmax of −∞ alone would be NaN.
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
    """A loss that is summed over the predictions of the global batch and divided by their number.

    loss(scores ŝ, w, u, s, s̄ of the previous step): float [N] except scalar s̄, s > 0 where w > 0 → scalar, Σ over N.
    degree: the power of s̄ by which the sum is divided. The loss is homogeneous in s, so the division can be applied
        to the summed gradient, after the reduction that yields s̄.
    """

    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    degree: int


def variance(
    scores: torch.Tensor, w: torch.Tensor, u: torch.Tensor, s: torch.Tensor, s_mean: torch.Tensor
) -> torch.Tensor:
    """Σ_{i∈M} w_i u_i(φ) s_i²: the mask variance up to terms independent of φ.

    E_M Σ w_i u_i s_i² = Σ_i (k/n)² E s_i² / π_i(φ) over all maskable positions, whichever proposal drew M: the second
    moment of a prediction's weighted gradient norm under the network's proposal. Minimum at π ∝ √E s².
    """
    return (w * u * s.square()).sum()


def regression(
    scores: torch.Tensor, w: torch.Tensor, u: torch.Tensor, s: torch.Tensor, s_mean: torch.Tensor
) -> torch.Tensor:
    """Σ_{i∈M} w_i (ŝ_i − log(s_i/s̄))². s̄ of the previous step is enough: π is invariant to a shift of all scores."""
    target = (s / s_mean).clamp(min=_SMALLEST_RATIO).log()
    return (w * (scores - target).square()).sum()


OBJECTIVES: dict[str, Objective] = {"variance": Objective(variance, 2), "regression": Objective(regression, 0)}
