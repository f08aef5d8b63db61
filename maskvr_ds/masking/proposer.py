"""Training of MAPNet: proposes the masks of a step, observes the resulting gradient norms, updates the network.

B sequences, L positions, K predictions per sequence, W ranks, P parameters of the network. π, u, w, s as in mapnet.py.
The network is replicated: initial weights are equal on all ranks (from the run's seed), gradients by the reduction,
hence parameters stay bit-identical, which is verified periodically.

The network learns at the steps of the run that `learn_every` divides: between them it only proposes, and neither
observes nor reduces anything. Its cost is dominated by the backward pass, and the scores change slowly.

Collectives, over the world group: one all-reduce of float32 [_SUMS + 2W + P] per step at which it learns (sums, one
slot per rank for the largest weight and for non-finite scores, the gradients of the unnormalised objective); one of
int64 [W] every `check_every` steps (hashes of the replicas), for which the host waits. No other host-device
synchronisation: s̄ and the state of the gate stay in tensors, and non-finite scores are reported one step after the
next one at which the network learns.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from maskvr_ds import hashing
from maskvr_ds.config import MapNetConfig
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.masking.gradient_norms import GradientNorms
from maskvr_ds.masking.mapnet import OBJECTIVES, MapNet, inclusion_from_scores
from maskvr_ds.run_folder.layout import MAPNET_STATE
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.deferred import DeferredFigures, DeferredTensor

_NAMES = (
    "gradient_norm_mean",
    "mapnet_loss",
    "variance_ratio",
    "effective_sample_size",
    "weight_max",
    "proposal_entropy",
    "proposal_used",
    "proposal_cost",
)
# Σ over the global batch: w s, w s², w u s², loss, weights of the losses, their squares, entropies, rows, predictions;
# over ranks: seconds of MAPNet, of the complete step.
_SUMS = 11
# Positions of a step whose scores are kept between `propose` and `observe`, with what their gradient needs: about 3 KB
# each at the default sizes. Further parts are computed twice.
_KEPT_POSITIONS = 1 << 17
# Decay per step of the gate's moving averages.
_DECAY = 0.99
# Gradients have heavy tails: β₂ is lower than AdamW's default.
_BETAS = (0.9, 0.99)
_WEIGHT_DECAY = 0.01


class Proposer:
    """MAPNet with its optimizer, gate and telemetry.

    An optimizer step calls `propose` (a strategies.Proposal) for every part of the local batch, `observe` for each part
    after the backward passes over its rows, and `step` at the end.

    Args:
        config: the config section.
        vocab_size, max_length: V, and the maximum sequence length.
        seed: of the initial weights, the same on all ranks.
        device: device of the batches.
    """

    def __init__(
        self, config: MapNetConfig, *, vocab_size: int, max_length: int, seed: int, device: torch.device
    ) -> None:
        self.config = config
        self.norms = GradientNorms()
        # When masks are drawn by the proposal; see MapNetConfig.
        self.gate: str = config.gate
        # The run's step, for error messages and `check_every`.
        self.run_step = 0
        self._objective = OBJECTIVES[config.objective]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hashing.fold(seed) >> 1)
            net = MapNet(
                vocab_size=vocab_size,
                max_length=max_length,
                layers=config.layers,
                hidden=config.hidden,
                reach=config.reach,
            )
        self.net = net.to(device)
        # One flat tensor of all parameters, one of the sums and all gradients: reduction and optimizer need no copies.
        self._head = _SUMS + 2 * distributed.world_size()
        self.parameters = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self.net.parameters()]))
        self._buffer = torch.zeros(self._head + len(self.parameters), device=device)
        gradients = self._buffer[self._head :]
        for p, data, gradient in zip(
            self.net.parameters(), self._pieces(self.parameters.data), self._pieces(gradients), strict=True
        ):
            p.data, p.grad = data, gradient
        self.parameters.grad = gradients
        self._optimizer = torch.optim.AdamW(
            [self.parameters], lr=config.lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY, foreach=False
        )
        # s̄ of the last step; moving averages of Σ w u s² and Σ w s² (per prediction), of MAPNet's and of all seconds.
        self._mean = torch.ones((), dtype=torch.float64, device=device)
        self._averages = torch.zeros(4, dtype=torch.float64, device=device)
        self._sums = torch.zeros(_SUMS, dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._faulty = torch.zeros((), dtype=torch.float64, device=device)
        self._unchecked: tuple[int, DeferredTensor] | None = None
        # Tokens of a part, its scores and π, by address of the tokens: what `observe` would compute once more.
        self._proposed: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # Whether `observe` follows: not while masks are only measured.
        self.learning = True
        measured = config.gate == "auto" and config.cost is None
        self._clock = _Clock(device) if measured else None

    def _pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat tensor [P] with the shapes of the parameters."""
        shapes = [p.shape for p in self.net.parameters()]
        return [t.view(shape) for t, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]

    def attach(self, model: torch.nn.Module) -> None:
        """Observe the gradient norms of a MaskedLanguageModel."""
        model.observer = self._watch  # type: ignore[assignment]

    def _watch(self, hidden: torch.Tensor, losses: torch.Tensor) -> None:
        if self.learns:
            self.norms.watch(hidden, losses)

    @property
    def learns(self) -> bool:
        """Whether the network learns from the step that follows: the same on all ranks."""
        return (self.run_step + 1) % self.config.learn_every == 0

    def _open(self) -> torch.Tensor:
        """Whether masks are drawn by the proposal: bool [], the same on all ranks.

        Gate `auto`: if (1 − m + m r) (1 + c) < 1, with moving averages of the variance ratio r and the cost c
        (MAPNet's time relative to the rest of the step), and the share m of the variance that is due to the masks
        (`mask_share`). At equal time the batch is smaller by a factor 1 + c, and the variance larger by the same
        factor: all of it, also the part due to the data, which the proposal does not change.
        """
        if self.gate != "auto":
            return torch.full_like(self._mean, self.gate == "always", dtype=torch.bool)
        proposed, uniform, own, total = self._averages
        share = self.config.mask_share
        return ((1 - share) * uniform + share * proposed) * total < uniform * (total - own)

    def _inclusion(
        self, batch: TokenBatch, maskable: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and the network's π, both float64 [B, L]. Non-finite scores are counted and replaced by 0."""
        scores = self.net(batch.input_ids.long(), batch.attention_mask).double()
        finite = scores.isfinite()
        self._faulty += (~finite & maskable).sum()
        scores = torch.where(finite, scores, 0.0)
        return scores, inclusion_from_scores(scores, maskable, counts, self.config.floor)

    def propose(self, batch: TokenBatch, maskable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """strategies.Proposal: π float64 [B, L] if the gate is open, uniform if it is closed."""
        if self.gate == "never":
            return share
        with self._timed():
            counts = (share[:, 0] * maskable.sum(1)).round().long()
            kept = sum(ids.numel() for ids, _, _ in self._proposed.values()) + batch.input_ids.numel()
            keep = self.learning and self.learns and kept <= _KEPT_POSITIONS
            with torch.set_grad_enabled(keep):
                scores, inclusion = self._inclusion(batch, maskable, counts)
            if keep:
                # The tensor is held: its address cannot become another's.
                self._proposed[batch.input_ids.data_ptr()] = batch.input_ids, scores, inclusion
            return torch.where(self._open(), inclusion.detach(), share)

    def observe(self, batch: TokenBatch, maskable: torch.Tensor, masked: MaskedBatch) -> None:
        """Accumulate sums and gradients from the gradient norms of a part; call after the backward passes over its
        rows, in their order, and over no others.

        batch: as given to `propose`; maskable: bool [B, L]; masked: the drawn masks. Predictions with a non-finite norm
        are skipped (fp16 overflow, for which the model's update is skipped too).
        """
        if not self.learns:
            return
        norms = self.norms.take()
        with self._timed():
            predicted = masked.weights != 0
            n, counts = maskable.sum(1), predicted.sum(1)
            share = (counts.double() / n.clamp(min=1))[:, None]
            # Of the mask's own network: parameters change only in `step`. Exactly k predictions, as proposed.
            kept = self._proposed.pop(batch.input_ids.data_ptr(), None)
            same = kept is not None and kept[0].shape == batch.input_ids.shape and masked.sampling_weights is not None
            scores, inclusion = kept[1:] if kept and same else self._inclusion(batch, maskable, counts)
            u = (share / inclusion).gather(1, masked.positions)
            used = predicted & norms.isfinite()
            # Strategies without a π of their own select every position with equal probability.
            w = used.double() if masked.sampling_weights is None else torch.where(used, masked.sampling_weights, 0.0)
            w = w.double()
            s = torch.where(used, norms, 0.0).double()
            loss = self._objective.loss(scores.gather(1, masked.positions), w, u, s, self._mean)
            loss.backward()
            with torch.no_grad():
                p = torch.where(maskable, inclusion / counts.clamp(min=1)[:, None], 1.0)
                # 1 for uniform; a row with a single maskable position has no freedom.
                entropy = torch.where(n > 1, -(p * p.log()).sum(1) / n.clamp(min=2).log(), 1.0) * (n > 0)
                ws2 = w * s.square()
                # The weights of the losses, which equal w only for the Horvitz–Thompson estimator.
                weights = torch.where(used, masked.weights, 0.0).double()
                terms = (w * s, ws2, u * ws2, loss, weights, weights.square(), entropy, n > 0, used)
                self._sums[: len(terms)] += torch.stack([term.sum().double() for term in terms])
                self._largest = torch.maximum(self._largest, weights.max())

    @torch.no_grad()
    def step(self) -> DeferredFigures | None:
        """Reduce, update the network and the gate; → the step's metrics, None if the network does not learn from it.
        Collective: call on all ranks, once per optimizer step.

        Raises on all ranks: FloatingPointError if scores up to the previous step were not finite; ReplicaError.
        """
        self.check()
        learns = self.learns
        self.run_step += 1
        figures = self._learn() if learns else None
        if self.run_step % self.config.check_every == 0:
            self.check_replicas()
        return figures

    def _learn(self) -> DeferredFigures:
        world_size, rank = distributed.world_size(), distributed.rank()
        if self._clock is not None:
            own, total = self._clock.read()
        else:
            own, total = self.config.cost or 0.0, 1 + (self.config.cost or 0.0)
        self._sums[9], self._sums[10] = own, total
        head = self._buffer[: self._head]
        head[:_SUMS] = self._sums
        head[_SUMS + rank] = self._largest
        head[_SUMS + world_size + rank] = self._faulty
        distributed.all_reduce_sum(self._buffer)
        sums = head[:_SUMS].double()
        ws, ws2, wus2, loss, w, w2, entropy, rows, predictions, own, total = sums
        predictions, rows = predictions.clamp(min=1), rows.clamp(min=1)
        s_mean = ws / predictions
        normaliser = predictions * s_mean**self._objective.degree
        factor = torch.where(normaliser > 0, 1 / normaliser, 0.0)
        # If the objective needs s̄ beforehand, the first step only measures it: with s̄ far off, the common shift of all
        # scores would dominate AdamW's second moment for a long time.
        known = self._averages[1] > 0 if self._objective.degree == 0 else factor > 0
        self._buffer[self._head :] *= torch.where(known, factor, 0.0).float()
        with self._timed():
            self._optimizer.step()
        opened = self._open()
        self._averages.lerp_(torch.stack([wus2 / predictions, ws2 / predictions, own, total]), 1 - _DECAY)
        self._mean = torch.where(s_mean > 0, s_mean, self._mean)
        figures = torch.stack(
            [
                s_mean,
                loss * factor,
                # Variance under the network's proposal, used or not, relative to uniform masks. Both sums over the
                # drawn predictions are unbiased: for Σ_i s_i² (k/n)²/π_i(φ) and Σ_i s_i² k/n over all positions.
                wus2 / ws2,
                # (Σv)² / Σv² of the losses' weights v, relative to their number: 1 for equal weights.
                w.square() / (w2 * predictions),
                head[_SUMS : _SUMS + world_size].max().double(),
                entropy / rows,
                opened.double(),
                own / (total - own),
            ]
        )
        self._unchecked = (self.run_step, DeferredTensor(head[_SUMS + world_size :]))
        self._proposed.clear()
        self._buffer.zero_()
        self._sums.zero_()
        self._largest = torch.zeros_like(self._largest)
        self._faulty = torch.zeros_like(self._faulty)
        return DeferredFigures(_NAMES, figures)

    def check(self) -> None:
        """Raise FloatingPointError, on all ranks, if scores up to the last step that the network learnt from were not
        finite."""
        if self._unchecked is None:
            return
        step, faulty = self._unchecked
        self._unchecked = None
        counts = faulty.values()
        if bad := [rank for rank, count in enumerate(counts) if count]:
            raise FloatingPointError(
                f"step {step}: MAPNet's scores are not finite on rank {', '.join(map(str, bad))}; resume from the last "
                "checkpoint with a lower masking.mapnet.lr"
            )

    def check_replicas(self) -> None:
        """Compare the ranks' parameters. Raises ReplicaError on all ranks, naming those unlike the most common."""
        hashes = torch.zeros(distributed.world_size(), dtype=torch.int64, device=self._buffer.device)
        hashes[distributed.rank()] = bits_hash(self.parameters.detach())
        all_hashes = distributed.all_reduce_sum(hashes).tolist()
        # If several are equally frequent, that of the lowest rank.
        common = Counter(all_hashes).most_common(1)[0][0]
        if different := [rank for rank, each in enumerate(all_hashes) if each != common]:
            raise distributed.ReplicaError(
                f"step {self.run_step}: MAPNet's parameters on rank {', '.join(map(str, different))} differ from those "
                f"on rank {all_hashes.index(common)}, due to a memory or network fault; resume from the last checkpoint"
            )

    def _timed(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._clock is None else self._clock

    def state(self) -> dict[str, torch.Tensor]:
        """State for resuming, on the CPU: parameters and AdamW's moments by name, s̄, the gate's moving averages."""
        adam = self._optimizer.state.get(self.parameters, {})
        flat = {"parameters": self.parameters.detach()}
        flat |= {key: adam.get(key, torch.zeros_like(flat["parameters"])) for key in ("exp_avg", "exp_avg_sq")}
        tensors = {"step": adam.get("step", torch.zeros(())), "mean": self._mean, "averages": self._averages}
        for key, tensor in flat.items():
            names = [name for name, _ in self.net.named_parameters()]
            tensors |= {f"{key}.{name}": t for name, t in zip(names, self._pieces(tensor), strict=True)}
        return {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}

    def metadata(self) -> dict[str, str]:
        """Metadata of the state file: the config section, as JSON."""
        return {"mapnet": json.dumps(self.config.model_dump())}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore a `state`. Raises ValueError if it belongs to a network of different shape."""
        own = self.state()
        different = [
            n for n in {*own, *tensors} if n not in own or n not in tensors or own[n].shape != tensors[n].shape
        ]
        if different:
            raise ValueError(
                f"{MAPNET_STATE} does not match the network described by masking.mapnet; different tensors: "
                f"{', '.join(sorted(different)[:3])}"
            )
        adam: dict[str, torch.Tensor] = {"step": tensors["step"].clone()}
        for key in ("exp_avg", "exp_avg_sq"):
            adam[key] = torch.zeros_like(self.parameters.detach())
            self._fill(adam[key], tensors, key)
        self._fill(self.parameters.data, tensors, "parameters")
        self._optimizer.state[self.parameters] = adam
        self._mean.copy_(tensors["mean"])
        self._averages.copy_(tensors["averages"])

    def _fill(self, flat: torch.Tensor, tensors: Mapping[str, torch.Tensor], key: str) -> None:
        for (name, _), piece in zip(self.net.named_parameters(), self._pieces(flat), strict=True):
            piece.copy_(tensors[f"{key}.{name}"])


def bits_hash(flat: torch.Tensor) -> torch.Tensor:
    """int64 []: hash of the bits of a float32 tensor [P], depending on their order."""
    bits = flat.view(torch.int32).long() & 0xFFFF_FFFF
    return hashing.mix(bits ^ (torch.arange(len(flat), device=flat.device) << 32)).sum()


class _Clock(AbstractContextManager["_Clock"]):
    """Seconds spent inside `with`, without synchronisation: by CUDA events on a GPU, else by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        mark: Callable[[], Any] = time.perf_counter
        self._on_device = device.type == "cuda"
        self._mark = self._event if self._on_device else mark
        self._now: list[tuple[Any, Any]] = []
        self._before: list[tuple[Any, Any]] = []
        self._last = self._before_last = None
        self._start: Any = None

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> "_Clock":
        self._start = self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        self._now.append((self._start, self._mark()))

    def _between(self, start: Any, end: Any) -> float:
        if not self._on_device:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def read(self) -> tuple[float, float]:
        """Seconds inside `with` and seconds in total, both for the last but one interval between readings (whose events
        have completed); 0, 0 for the first readings."""
        own = sum(self._between(*pair) for pair in self._before)
        now = self._mark()
        total = 0.0 if self._before_last is None else self._between(self._before_last, self._last)
        self._before, self._now = self._now, []
        self._before_last, self._last = self._last, now
        return (own, total) if total else (0.0, 0.0)
