"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175) and a large-margin term (Wang et al. 2018, arXiv
1807.02872).

Shapes: E episodes, N classes (ways), K support examples (shots), Q query examples per class, D hidden. With the
embedding z_i of query i of class y, and the prototype c_k, the mean of the support embeddings of class k:

    d_ik    = ‖z_i − c_k‖²
    softmax = 1/(NQ) Σ_i −log( exp(−d_iy) / Σ_k exp(−d_ik) )
    margin  = 1/(NQ(N−1)) Σ_i Σ_{k≠y} max(0, m + d_iy − d_ik)
    loss    = softmax + λ · margin

m: `margin`, λ: `weight`; λ = 0 is the plain prototypical network. The normalised form takes the distances of the margin
term between z_i/‖z_i‖ and c_k/‖c_k‖, so that they lie in [0, 4] and a margin means the same for every encoder; the
unnormalised form takes d itself, whose scale depends on the encoder.

Uncertain: the paper "augments the softmax classification loss with a large margin distance loss" (its abstract), and
names a triplet loss; which examples of an episode form the triplets, how they are averaged, and m and λ are choices
made here. The anchor is a query, the positive its own prototype, a negative each other prototype; the mean is over all
triplets, also those that keep the margin. Wang et al. may use unnormalised distances between examples instead.
"""

import torch
import torch.nn.functional as F


def prototypes(support: torch.Tensor) -> torch.Tensor:
    """[…, N, K, D] → […, N, D]: means over the shots."""
    return support.mean(-2)


def squared_distances(query: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """d: […, M, D], […, N, D] → […, M, N], from the differences themselves: products would cancel."""
    return (query.unsqueeze(-2) - centres.unsqueeze(-3)).square().sum(-1)


def margin_loss(distances: torch.Tensor, truth: torch.Tensor, margin: float) -> torch.Tensor:
    """The margin term from d [M, N] and the classes int64 [M]: []."""
    own = distances.gather(1, truth.unsqueeze(1))
    violations = F.relu(margin + own - distances)
    others = F.one_hot(truth, distances.shape[1]) == 0
    return violations[others].mean()


def episode_loss(
    support: torch.Tensor, query: torch.Tensor, *, weight: float = 0.0, margin: float = 0.0, normalised: bool = True
) -> torch.Tensor:
    """The loss of one episode from embeddings [N, K, D] and [N, Q, D]: []. weight: λ; margin: m."""
    ways, queries, _ = query.shape
    truth = torch.arange(ways, device=query.device).repeat_interleave(queries)
    z, centres = query.flatten(0, 1), prototypes(support)
    distances = squared_distances(z, centres)
    loss = F.cross_entropy(-distances, truth)
    if weight:
        if normalised:
            distances = squared_distances(F.normalize(z, dim=-1), F.normalize(centres, dim=-1))
        loss = loss + weight * margin_loss(distances, truth, margin)
    return loss


def nearest_prototype(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Place of the nearest prototype of each query: [E, N, K, D], [E, M, D] → int64 [E, M]."""
    exact = "donot_use_mm_for_euclid_dist"  # products would cancel
    return torch.cdist(query, prototypes(support), compute_mode=exact).argmin(-1)
