"""Base class of LAMB, LARS and StableAdamW: scales updates per tensor, however tensors are split over ranks.

The scale of a tensor is a function of sums over its elements, S of them (LAMB: Σw² and Σu²).

Collective: one all-reduce (sum) per optimizer step, over the data-parallel group, of one fp32 vector [S · T]. None if
each rank holds full tensors (no DeepSpeed, ZeRO 0).

Shapes: T trainable tensors.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from maskvr_ds.optim import checks
from maskvr_ds.optim.partitions import Fragment, Partition, trainable, whole_tensors
from maskvr_ds.optim.variants import Variant

if TYPE_CHECKING:
    from maskvr_ds.optim.fused import FusedUpdate

# Summing fp32 squares in one pass loses digits on CPUs: 4e-4 relative for a vocabulary embedding. Norms are therefore
# taken over chunks of this many elements, and then over the chunks' norms.
NORM_CHUNK = 1 << 20
# Launching a kernel takes longer than updating a bias. In partitions of small tensors (fewer elements on average than
# the first constant) scales are therefore expanded to elements and applied in one kernel. The index for that is cached,
# which is why the second constant limits the size of such partitions.
_SPREAD_BELOW, _SPREAD_AT_MOST = 1 << 15, 1 << 22


@dataclass(frozen=True)
class Update:
    """Pending update of some partitions of one parameter group."""

    partitions: list[Tensor]
    updates: list[Tensor]  # u, laid out like the partitions; empty if fused
    layouts: list[Partition]  # their fragments
    lr: float
    adapted: bool
    fused: "FusedUpdate | None" = None
    sums: Tensor | None = None  # from `_measure`

    @property
    def fragments(self) -> list[Fragment]:
        return [fragment for layout in self.layouts for fragment in layout.fragments]

    def views(self, flats: list[Tensor]) -> list[Tensor]:
        """Fragments of `partitions` or `updates`, concatenated."""
        return [view for layout, flat in zip(self.layouts, flats, strict=True) for view in layout.views(flat)]


class LayerwiseAdaptive(torch.optim.Optimizer, ABC):
    """Base class. Subclasses define the state, u, and its scales; this class scales u and subtracts it."""

    fused = False
    # Whether `step` may use the memory of the gradients: set if nothing reads them afterwards (engine/streamline.py).
    overwrites_gradients = False
    # Of the gradients, applied by `step`: fp32 scalar. Set by an engine that clips this way (engine/streamline.py).
    gradient_factor: Tensor | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], variant: Variant) -> None:
        self._check_settings(defaults)
        self.variant = variant
        self._bound = False
        self._given: list[dict[str, Any]] = []  # the groups' settings as constructed
        self._pending: list[Update] = []
        self._last_scales: Tensor | None = None
        super().__init__(params, defaults)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError if a setting of a parameter group is out of range."""
        checks.check_rate(settings["lr"])
        checks.check_number("weight_decay", settings["weight_decay"])
        checks.check_switches(settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for settings out of range, TypeError for complex tensors and shards of FSDP."""
        self._require_own_parameters("add a parameter group")
        self._check_settings({**self.defaults, **param_group})
        param_group["group_index"] = len(self.param_groups)
        super().add_param_group(param_group)
        self._given.append({k: v for k, v in self.param_groups[-1].items() if k not in ("params", "param_names")})
        self._layout = whole_tensors(self.param_groups)
        checks.check_tensors(type(self).__name__, self._layout.tensors, self._layout.names)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the state of torch's AdamW fits Lamb and StableAdamW. Raises ValueError for that of others."""
        checks.check_loaded(type(self).__name__, state_dict, self.defaults)
        super().load_state_dict(state_dict)
        self._pending = []  # of a step that was interrupted
        for state in self.state.values():
            if "step" in state:  # a tensor in the state of torch's optimizers
                state["step"] = int(state["step"])

    def __getstate__(self) -> dict[str, Any]:
        self._require_own_parameters("be copied or pickled")
        return {**super().__getstate__(), "variant": self.variant, "fused": self.fused, "_given": self._given}

    def _require_own_parameters(self, action: str) -> None:
        """Raise RuntimeError if DeepSpeed has replaced the parameters: `action` needs the model's own tensors."""
        given = trainable([{"params": self._layout.tensors}]) if "_layout" in self.__dict__ else []
        if given and set(trainable(self.param_groups)) != set(given):
            raise RuntimeError(
                f"{type(self).__name__} can no longer {action}: DeepSpeed has replaced its parameters with "
                "partitions or master weights. Do it before deepspeed.initialize, or use state_dict()"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch also calls this to load a state dict; only a copied or unpickled optimizer has no layout.
        super().__setstate__(state)
        if "_layout" not in self.__dict__:
            self._bound, self._pending, self._last_scales = False, [], None
            self._layout = whole_tensors(self.param_groups)

    @property
    def tensor_names(self) -> list[str]:
        """Names of the T tensors: DeepSpeed's after `bind`, else those passed in, else "group.position"."""
        return self._layout.names

    @abstractmethod
    def _new_state(self, partition: Tensor) -> dict[str, Any]:
        """Initial state of a partition."""

    @abstractmethod
    def _advance(self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor]) -> None:
        """Update the moments with the gradients."""

    @abstractmethod
    def _updates(self, group: dict[str, Any], partitions: list[Tensor], step: int) -> list[Tensor]:
        """u at step `step` (1-based), shaped like the partitions."""

    def _measure(
        self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor], step: int
    ) -> list[Tensor] | None:
        """Tensors laid out like the partitions, whose squares are summed per tensor; None if `_sums` needs none.

        Called after `_advance`, before `_updates`: the gradients are gone when the sums are needed.
        """
        return None

    @abstractmethod
    def _sums(self, pending: list[Update], weights: list[list[Tensor]], updates: list[list[Tensor]]) -> Tensor:
        """This rank's contribution to the sums: fp32 [S, T]. weights, updates: views of each entry's fragments."""

    @abstractmethod
    def _scales(self, sums: Tensor, pending: list[Update]) -> Tensor:
        """Factor of each tensor's u, from the completed sums: fp32 [T]. NaN stays NaN: divergence must be visible."""

    def _piecewise(
        self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor], step: int
    ) -> list[Tensor] | None:
        """What `_advance` and `_updates` do, for pieces that stay in a CPU's cache: u; None if they shall do it."""
        return None

    def _fuse(
        self, group: dict[str, Any], partitions: list[Tensor], layouts: list[Partition], step: int, scale: Tensor | None
    ) -> "FusedUpdate | None":
        """The update by Triton kernels, whose moments are then done; None to use `_advance` and `_updates`."""
        return None

    def _rate(self, group: dict[str, Any], step: int) -> float:
        """η at step `step` (1-based)."""
        return group["lr"]

    def _adapts(self, group: dict[str, Any]) -> bool:
        """Whether the group's tensors are scaled."""
        return True

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # compiled, appending to the pending updates was repeated
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimizer step; `closure`, if given, recomputes the loss, which is returned.

        ZeRO calls this once per parameter group (stages 1, 2) or sub-group (stage 3) and hides the others from
        `param_groups`. Updates are held back until the last call, so that all of them share one all-reduce.

        Raises:
            RuntimeError: if `bind` was not called under ZeRO, gradients are sparse, or an earlier ZeRO step was
                interrupted half-way.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._layout_matches():
            return loss
        checks.check_gradients(type(self).__name__, self.param_groups)
        self._restore_groups()
        earlier_calls = len(self._pending)
        scale = self._gradient_scale()
        sharded = self._layout.process_group is not None
        try:
            for group in self.param_groups:
                self._accumulate(group, scale)
        except BaseException:
            if not sharded:
                self._pending = []
            raise
        if not sharded or sum(len(u.partitions) for u in self._pending) == len(self._layout.partitions):
            self._apply(earlier_calls)
        return loss

    def _layout_matches(self) -> bool:
        """True if `param_groups` holds the tensors of the layout; False for DeepSpeed's initial dry step."""
        present = trainable(self.param_groups)
        if all(p in self._layout.partitions for p in present):
            return True
        given = trainable([{"params": self._layout.tensors}])
        unpartitioned = not any(hasattr(t, "ds_tensor") for t in given)
        dry = not any(p.grad is not None and p.grad.any() for p in present)
        if unpartitioned and dry and not self.state and [p.shape for p in present] == [t.shape for t in given]:
            # FP16_UnfusedOptimizer (ZeRO 0 in bf16) swaps in fp32 master weights and, during `deepspeed.initialize`,
            # steps once on zero gradients, only to allocate the state. A real step would decay the weights: with g = 0,
            # u = λw and the ratio 1/λ, η·w would be subtracted. The next call needs `bind`.
            for p in present:
                self._state_of(p)
            return False
        raise RuntimeError(
            f"the tensors in param_groups are not the ones {type(self).__name__} was constructed with: DeepSpeed "
            "replaced them with flat partitions or master weights, whose norms are meaningless; call "
            "maskvr_ds.lamb.bind(engine) once, right after deepspeed.initialize. Without DeepSpeed: param_groups was "
            "edited; use add_param_group, or construct the optimizer again"
        )

    def _restore_groups(self) -> None:
        """Undo a side effect of loading a universal checkpoint at stage 3: DeepSpeed gives all groups the settings of
        the first, such as its weight decay (stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3)."""
        indices = [group.get("group_index") for group in self.param_groups]
        if indices.count(indices[0]) < 2 or indices[0] is None:  # None: loaded from another optimizer's state
            return
        warnings.warn("loading overwrote the settings of parameter groups; restored as constructed", stacklevel=3)
        rates = [group["lr"] for group in self.param_groups]
        first = self._given[0]["lr"]
        for group, given in zip(self.param_groups, self._given, strict=True):
            # Different rates were set after loading; equal ones are the first group's, like everything else.
            scale = given["lr"] / first if len(set(rates)) == 1 and first else 1.0
            group.update(given, lr=group["lr"] * scale)

    def _state_of(self, partition: Tensor) -> dict[str, Any]:
        state = self.state[partition]
        if not state:
            state.update(self._new_state(partition))
        return state

    def _gradient_scale(self) -> Tensor | None:
        """Factor that limits the global gradient norm to `max_grad_norm`: fp32 scalar; None if DeepSpeed clips.
        That of the engine after `bind`."""
        if self._bound or self.variant.max_grad_norm == 0:
            return self.gradient_factor
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return None
        norm = squared_norms([gradients], range(len(gradients)), len(gradients), gradients[0].device).sum().sqrt()
        return (self.variant.max_grad_norm / norm).clamp(max=1.0)

    def _accumulate(self, group: dict[str, Any], scale: Tensor | None) -> None:
        """Update the moments of one group's partitions and append their u to `_pending`."""
        partitions: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if any(p is pending for u in self._pending for pending in u.partitions for p in partitions):
            raise RuntimeError(
                f"{type(self).__name__}.step was called twice for one partition before all others: an earlier step was "
                "interrupted half-way; restart from a checkpoint"
            )
        # Usually a single group; tensors without a gradient in some step lag behind.
        steps = {p: self._state_of(p)["step"] + 1 for p in partitions}
        for step, members in groupby(sorted(partitions, key=steps.__getitem__), key=steps.__getitem__):
            chosen = list(members)
            for p in chosen:
                self.state[p]["step"] = step
            layouts = [self._layout.partitions[p] for p in chosen]
            updates: list[Tensor] = []
            sums: Tensor | None = None
            if (fused := self._fuse(group, chosen, layouts, step, scale)) is None:
                gradients = [cast(Tensor, p.grad) for p in chosen]
                if scale is not None:
                    gradients = list(torch._foreach_mul(gradients, scale))
                if (piecewise := self._piecewise(group, chosen, gradients, step)) is not None:
                    updates = piecewise
                else:
                    self._advance(group, chosen, gradients)
                    if (measured := self._measure(group, chosen, gradients, step)) is not None:
                        sums = self._sum_squares(layouts, measured)
                    del gradients, measured  # scaled copies would otherwise be alive together with u
                    updates = self._updates(group, chosen, step)
            rate, adapted = self._rate(group, step), self._adapts(group)
            self._pending.append(Update(chosen, updates, layouts, rate, adapted, fused, sums))

    def _sum_squares(self, layouts: list[Partition], flats: list[Tensor]) -> Tensor:
        """Σx² of this rank's fragments by tensor: fp32 [T]. flats: laid out like the partitions."""
        views = [view for layout, flat in zip(layouts, flats, strict=True) for view in layout.views(flat)]
        indices = [fragment.tensor for layout in layouts for fragment in layout.fragments]
        return squared_norms([views], indices, len(self._layout.tensors), flats[0].device)[0]

    def _apply(self, earlier_calls: int) -> None:
        """Scale the pending updates and subtract them from the weights.

        The first `earlier_calls` entries are from before the current call of `step()`: ZeRO has already copied those
        partitions, not yet updated, into the model's weights, so they are copied again.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        layout = self._layout
        weights = [entry.views(entry.partitions) for entry in pending]
        updates = [entry.views(entry.updates) if entry.fused is None else [] for entry in pending]
        sums = self._sums(pending, weights, updates)
        scales = self._scales(layout.all_reduce(sums.view(-1)).view_as(sums), pending)
        self._last_scales = scales

        for number, entry in enumerate(pending):
            if entry.fused is not None:
                entry.fused.subtract(scales, entry.lr)
            else:
                _subtract(entry, weights[number], updates[number], scales)
            if number < earlier_calls and weights[number]:
                targets = [fragment.of_model(layout.tensors[fragment.tensor]) for fragment in entry.fragments]
                torch._foreach_copy_(targets, weights[number])


def _subtract(entry: Update, weights: list[Tensor], updates: list[Tensor], scales: Tensor) -> None:
    """w ← w − η · scale · u. weights, updates: views of the entry's fragments; scales: fp32 [T]."""
    single: list[int] = []  # fragments that are not updated together with their partition
    first = 0
    for flat, update, layout in zip(entry.partitions, entry.updates, entry.layouts, strict=True):
        count = len(layout.fragments)
        if _spreads(layout, flat.device):
            end = layout.end
            owners = _owners(tuple((f.tensor, f.length) for f in layout.fragments), flat.device)
            spread = scales.index_select(0, owners).to(flat.dtype)
            flat.narrow(0, 0, end).addcmul_(update.narrow(0, 0, end), spread, value=-entry.lr)
        else:
            single += range(first, first + count)
        first += count
    if single:
        by_tensor, fragments = scales.unbind(), entry.fragments
        factors = [by_tensor[fragments[i].tensor] for i in single]
        torch._foreach_addcmul_([weights[i] for i in single], [updates[i] for i in single], factors, value=-entry.lr)


def _spreads(layout: Partition, device: torch.device) -> bool:
    """Whether to expand scales to a partition's elements. Not on CPUs, where it would only take memory."""
    count, end = len(layout.fragments), layout.end
    return device.type != "cpu" and count > 1 and end <= min(_SPREAD_BELOW * count, _SPREAD_AT_MOST) and layout.is_dense


@lru_cache(maxsize=64)
def _owners(fragments: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(tensor, length) per fragment → int32 [Σ length]: index of each element's tensor."""
    tensors, lengths = torch.tensor(fragments).unbind(1)
    return tensors.int().repeat_interleave(lengths).to(device)


def squared_norms(lists: Sequence[list[Tensor]], indices: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Σx² of each view at the index of its tensor, 0 elsewhere: fp32 [len(lists), count].

    lists: lists of views with the same shapes in each. indices: tensor of each view.
    """
    if not indices:
        return torch.zeros((len(lists), count), device=device)
    chunks = [
        chunk
        for x in chain.from_iterable(lists)
        for chunk in (x.flatten().split(NORM_CHUNK) if x.numel() > NORM_CHUNK else (x,))
    ]
    # Norms cannot be taken in a narrower dtype than that of the tensor.
    wide = torch.float64 if any(chunk.dtype == torch.float64 for chunk in chunks) else torch.float32
    norms = torch.stack(torch._foreach_norm(chunks, 2, dtype=wide)).float().view(len(lists), -1)
    numbers = tuple(max(1, -(-x.numel() // NORM_CHUNK)) for x in lists[0])
    # Append a zero, which pads tensors with fewer chunks.
    norms = torch.nn.functional.pad(norms, (0, 1))
    return norms[:, _chunks_of(tuple(indices), numbers, count, device)].square().sum(2)


@lru_cache(maxsize=64)
def _chunks_of(indices: tuple[int, ...], numbers: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Positions of each tensor's chunks among all chunks: int64 [count, maximum chunks per tensor], padded with −1.

    indices: tensor of each view. numbers: its number of chunks. Summing by a table is deterministic on every device;
    index_add is not.
    """
    places: list[list[int]] = [[] for _ in range(count)]
    start = 0
    for index, number in zip(indices, numbers, strict=True):
        places[index] += range(start, start + number)
        start += number
    most = max(map(len, places))
    return torch.tensor([p + [-1] * (most - len(p)) for p in places], device=device)
