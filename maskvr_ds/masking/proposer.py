"""MAPNet in training: proposes the masks of a step, observes the gradient norms that they gave, steps by itself.

B sequences, L positions, K predictions a sequence, W ranks, P parameters of the network. π, u, w, s as in mapnet.py.
The network is replicated: equal initial weights on all ranks from the run's seed, equal gradients by the reduction,
hence equal bits ever after; that is checked, not believed.

Collectives, over the world group: one all-reduce of float32 [_SUMS + 2W + P] per optimizer step (sums, a slot a rank
for the largest weight and for faulty scores, the gradients of the unnormalised objective); one of int64 [W] every
`check_every` steps (hashes of the replicas), for which the host waits. Nothing else here waits for the device: what
the step needs to know of itself (s̄, the gate) stays in tensors, and faults are told one step later.
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
# over ranks: seconds of MAPNet, of the whole step.
_SUMS = 11
# What a step leaves of the gate's moving averages.
_DECAY = 0.99
# Heavy tails: the second moment forgets faster than by default.
_BETAS = (0.9, 0.99)
_WEIGHT_DECAY = 0.01


class ReplicaError(ArithmeticError):
    """The networks of the ranks are no longer equal. Raised on every rank alike."""


class Proposer:
    """MAPNet with its optimizer, gate and telemetry.

    A step: `propose` (a strategies.Proposal) for every micro-batch, `observe` after each backward pass, `step` at the
    end.

    Args:
        config: the section.
        vocab_size, max_length: V, and the most positions that a sequence may have.
        seed: of the initial weights, the same on every rank.
        device: where batches lie.
    """

    def __init__(
        self, config: MapNetConfig, *, vocab_size: int, max_length: int, seed: int, device: torch.device
    ) -> None:
        self.config = config
        self.norms = GradientNorms()
        # When masks are drawn by the proposal: see MapNetConfig.
        self.gate: str = config.gate
        # Of the run: what errors name and `check_every` counts.
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
        # One tensor of all parameters, one of all gradients behind the sums: reduction and optimizer copy nothing.
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
        # s̄ of the last step; moving averages of Σ w u s², Σ w s² (per prediction), MAPNet's and all seconds.
        self._mean = torch.ones((), dtype=torch.float64, device=device)
        self._averages = torch.zeros(4, dtype=torch.float64, device=device)
        self._sums = torch.zeros(_SUMS, dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._faulty = torch.zeros((), dtype=torch.float64, device=device)
        self._told: tuple[int, DeferredTensor] | None = None
        measured = config.gate == "auto" and config.cost is None
        self._clock = _Clock(device) if measured else None

    def _pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a tensor [P] in the shapes of the parameters."""
        shapes = [p.shape for p in self.net.parameters()]
        return [t.view(shape) for t, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]

    def attach(self, model: torch.nn.Module) -> None:
        """Read the gradient norms of a MaskedLanguageModel from now on."""
        model.observer = self.norms.watch  # type: ignore[assignment]

    def _open(self) -> torch.Tensor:
        """Whether the masks are drawn by the proposal, bool []; the same on every rank.

        auto: while the variance ratio r and the cost c (MAPNet's share of the time of the rest) have r (1 + c) < 1, by
        their moving averages: at equal time the batch is smaller by 1 + c, the variance larger by as much.
        """
        if self.gate != "auto":
            return torch.full_like(self._mean, self.gate == "always", dtype=torch.bool)
        proposed, uniform, own, whole = self._averages
        return proposed * whole < uniform * (whole - own)

    def _inclusion(
        self, batch: TokenBatch, maskable: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores float64 and the network's π float64, both [B, L]. Scores that are not finite are counted, and 0."""
        scores = self.net(batch.input_ids.long(), batch.attention_mask).double()
        finite = scores.isfinite()
        self._faulty += (~finite & maskable).sum()
        scores = torch.where(finite, scores, 0.0)
        return scores, inclusion_from_scores(scores, maskable, counts, self.config.floor)

    @torch.no_grad()
    def propose(self, batch: TokenBatch, maskable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """strategies.Proposal: π float64 [B, L] while the gate is open, uniform while it is closed."""
        if self.gate == "never":
            return share
        with self._timed():
            counts = (share[:, 0] * maskable.sum(1)).round().long()
            _, inclusion = self._inclusion(batch, maskable, counts)
            return torch.where(self._open(), inclusion, share)

    def observe(self, batch: TokenBatch, maskable: torch.Tensor, masked: MaskedBatch) -> None:
        """Take in the gradient norms of a micro-batch, after its backward pass: adds to sums and gradients.

        batch: as proposed for; maskable bool [B, L]; masked: what was drawn. Predictions whose norm is not finite
        (fp16 overflow: the model's step is left out too) are left out.
        """
        norms = self.norms.take()
        with self._timed():
            predicted = masked.weights != 0
            n, counts = maskable.sum(1), predicted.sum(1)
            share = (counts.double() / n.clamp(min=1))[:, None]
            scores, inclusion = self._inclusion(batch, maskable, counts)
            u = (share / inclusion).gather(1, masked.positions)
            used = predicted & norms.isfinite()
            # Strategies without a π of their own give every position the same one.
            w = used.double() if masked.sampling_weights is None else torch.where(used, masked.sampling_weights, 0.0)
            w = w.double()
            s = torch.where(used, norms, 0.0).double()
            loss = self._objective.loss(scores.gather(1, masked.positions), w, u, s, self._mean)
            loss.backward()
            with torch.no_grad():
                p = torch.where(maskable, inclusion / counts.clamp(min=1)[:, None], 1.0)
                # 1 for uniform; a row of one position has no choice.
                entropy = torch.where(n > 1, -(p * p.log()).sum(1) / n.clamp(min=2).log(), 1.0) * (n > 0)
                ws2 = w * s.square()
                # What the losses were multiplied with, which w is only under Horvitz–Thompson.
                weights = torch.where(used, masked.weights, 0.0).double()
                terms = (w * s, ws2, u * ws2, loss, weights, weights.square(), entropy, n > 0, used)
                self._sums[: len(terms)] += torch.stack([term.sum().double() for term in terms])
                self._largest = torch.maximum(self._largest, weights.max())

    @torch.no_grad()
    def step(self) -> DeferredFigures:
        """Reduce, normalise, update, decide. Every rank calls, once an optimizer step; → the step's figures.

        Raises, on every rank alike, FloatingPointError where scores of the step before were not finite, ReplicaError.
        """
        self.check()
        self.run_step += 1
        world_size, rank = distributed.world_size(), distributed.rank()
        if self._clock is not None:
            own, whole = self._clock.read()
        else:
            own, whole = self.config.cost or 0.0, 1 + (self.config.cost or 0.0)
        self._sums[9], self._sums[10] = own, whole
        head = self._buffer[: self._head]
        head[:_SUMS] = self._sums
        head[_SUMS + rank] = self._largest
        head[_SUMS + world_size + rank] = self._faulty
        distributed.all_reduce_sum(self._buffer)
        sums = head[:_SUMS].double()
        ws, ws2, wus2, loss, w, w2, entropy, rows, predictions, own, whole = sums
        predictions, rows = predictions.clamp(min=1), rows.clamp(min=1)
        s_mean = ws / predictions
        normaliser = predictions * s_mean**self._objective.degree
        factor = torch.where(normaliser > 0, 1 / normaliser, 0.0)
        # Where the objective needs s̄ beforehand, the first step only brings it: far off, the scores' common shift would
        # weigh on AdamW's second moment for a long time.
        known = self._averages[1] > 0 if self._objective.degree == 0 else factor > 0
        self._buffer[self._head :] *= torch.where(known, factor, 0.0).float()
        with self._timed():
            self._optimizer.step()
        opened = self._open()
        self._averages.lerp_(torch.stack([wus2 / predictions, ws2 / predictions, own, whole]), 1 - _DECAY)
        self._mean = torch.where(s_mean > 0, s_mean, self._mean)
        figures = torch.stack(
            [
                s_mean,
                loss * factor,
                # Under the network's proposal, whether used or not, relative to uniform masks: both are Σ over drawn
                # predictions that estimate, unbiased, Σ_i s_i² (k/n)²/π_i(φ) and Σ_i s_i² k/n over all positions.
                wus2 / ws2,
                # Of the losses' weights v, (Σv)² / Σv², relative to their number: 1 with equal weights.
                w.square() / (w2 * predictions),
                head[_SUMS : _SUMS + world_size].max().double(),
                entropy / rows,
                opened.double(),
                own / (whole - own),
            ]
        )
        self._told = (self.run_step, DeferredTensor(head[_SUMS + world_size :]))
        self._buffer.zero_()
        self._sums.zero_()
        self._largest = torch.zeros_like(self._largest)
        self._faulty = torch.zeros_like(self._faulty)
        if self.run_step % self.config.check_every == 0:
            self.check_replicas()
        return DeferredFigures(_NAMES, figures)

    def check(self) -> None:
        """Raise FloatingPointError, on every rank alike, where scores of the last step were not finite."""
        if self._told is None:
            return
        step, faulty = self._told
        self._told = None
        counts = faulty.values()
        if bad := [rank for rank, count in enumerate(counts) if count]:
            raise FloatingPointError(
                f"step {step}: MAPNet's scores are not finite on rank {', '.join(map(str, bad))}; resume from the last "
                "checkpoint with a lower mapnet.lr"
            )

    def check_replicas(self) -> None:
        """Compare the ranks' networks. Raises ReplicaError, on every rank alike, naming those unlike the most."""
        hashes = torch.zeros(distributed.world_size(), dtype=torch.int64, device=self._buffer.device)
        hashes[distributed.rank()] = bits_hash(self.parameters.detach())
        found = distributed.all_reduce_sum(hashes).tolist()
        # The first of equally frequent ones: that of the lowest rank.
        common = Counter(found).most_common(1)[0][0]
        if different := [rank for rank, each in enumerate(found) if each != common]:
            raise ReplicaError(
                f"step {self.run_step}: MAPNet's parameters on rank {', '.join(map(str, different))} differ from those "
                f"on rank {found.index(common)}: a fault of memory or network; resume from the last checkpoint"
            )

    def _timed(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._clock is None else self._clock

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resume needs, on the CPU: parameters and moments by name, s̄, the gate's averages."""
        adam = self._optimizer.state.get(self.parameters, {})
        flat = {"parameters": self.parameters.detach()}
        flat |= {key: adam.get(key, torch.zeros_like(flat["parameters"])) for key in ("exp_avg", "exp_avg_sq")}
        tensors = {"step": adam.get("step", torch.zeros(())), "mean": self._mean, "averages": self._averages}
        for key, tensor in flat.items():
            names = [name for name, _ in self.net.named_parameters()]
            tensors |= {f"{key}.{name}": t for name, t in zip(names, self._pieces(tensor), strict=True)}
        return {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}

    def metadata(self) -> dict[str, str]:
        """What the state's file says of itself: the section, in JSON."""
        return {"mapnet": json.dumps(self.config.model_dump())}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`. Raises ValueError where it is of another network."""
        mine = self.state()
        unlike = [
            n for n in {*mine, *tensors} if n not in mine or n not in tensors or mine[n].shape != tensors[n].shape
        ]
        if unlike:
            raise ValueError(
                f"{MAPNET_STATE}: of another network than mapnet describes: {', '.join(sorted(unlike)[:3])}"
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
    """int64 []: hash of the bits of a float32 tensor [P] and of their order."""
    bits = flat.view(torch.int32).long() & 0xFFFF_FFFF
    return hashing.mix(bits ^ (torch.arange(len(flat), device=flat.device) << 32)).sum()


class _Clock(AbstractContextManager["_Clock"]):
    """Seconds spent inside `with`, by the device's clock where it computes by itself, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        mark: Callable[[], Any] = time.perf_counter
        self._on_device = device.type == "cuda"
        self._mark = self._event if self._on_device else mark
        self._now: list[tuple[Any, Any]] = []
        self._before: list[tuple[Any, Any]] = []
        self._last = self._before_last = None
        self._begin: Any = None

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> "_Clock":
        self._begin = self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        self._now.append((self._begin, self._mark()))

    def _between(self, begin: Any, end: Any) -> float:
        if not self._on_device:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def read(self) -> tuple[float, float]:
        """Seconds inside, and from one reading to the next, both of the period before the last; 0, 0 at first."""
        own = sum(self._between(*pair) for pair in self._before)
        now = self._mark()
        whole = 0.0 if self._before_last is None else self._between(self._before_last, self._last)
        self._before, self._now = self._now, []
        self._before_last, self._last = self._last, now
        return (own, whole) if whole else (0.0, 0.0)
