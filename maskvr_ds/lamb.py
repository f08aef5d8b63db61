"""LAMB that stays correct when ZeRO cuts the parameters into flat partitions.

You, Li, Reddi et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
arXiv:1904.00962, Algorithm 2. For every parameter tensor w with gradient g, at step t:

    m ← β₁ m + (1 − β₁) g                m̂ = m / (1 − β₁ᵗ)
    v ← β₂ v + (1 − β₂) g²               v̂ = v / (1 − β₂ᵗ)
    u = m̂ / (√v̂ + ε) + λ w
    w ← w − η · φ(‖w‖) / ‖u‖ · u

Differences from the paper:
- φ is the identity: neither ‖w‖ nor the trust ratio φ(‖w‖) / ‖u‖ is clamped.
- The ratio is 1 where ‖w‖ or ‖u‖ is 0 (the paper leaves it undefined), so zero-initialised biases move.
  Norms are summed as squares in fp32: one below 1e-23 counts as 0.
- Every tensor is adapted, biases and LayerNorms too; which tensors decay is up to the groups' λ.

Under ZeRO 1 and 2, and under DeepSpeed's BF16_Optimizer, the optimizer is handed one flat fp32 partition per
parameter group instead of the parameters; tensors begin, end and straddle ranks anywhere in it. A norm over
such a partition is not the norm of anything (deepspeedai/DeepSpeed#490). `bind` reads from DeepSpeed which
piece of which tensor lies where; norms are then taken per piece and completed over the ranks.

Collective: one all-reduce (sum) per optimizer step, over the data-parallel group, of one fp32 vector of
2 × tensors values: Σw² of every tensor, then Σu² of every tensor. None where each rank holds whole tensors
(no DeepSpeed, or ZeRO 0).

Shapes: T tensors being trained; N elements of a partition (fp32, one-dimensional, padded at the end).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Summing squares of fp32 in one go loses digits on CPUs: 4e-4 relative for a vocabulary embedding. Norms are
# therefore taken over pieces of this many elements, and then over the pieces' norms.
NORM_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Fragment:
    """One contiguous piece of one tensor inside one partition of this rank; all in elements."""

    tensor: int  # index in _Layout.tensors
    tensor_start: int
    partition_start: int
    length: int

    def of_partition(self, flat: Tensor) -> Tensor:
        if self.length == flat.numel():
            return flat  # a whole tensor keeps its shape: foreach kernels need no flattening
        return flat.narrow(0, self.partition_start, self.length)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1).narrow(0, self.tensor_start, self.length)


@dataclass(frozen=True)
class _Layout:
    """Where the tensors are in what `param_groups` holds ("partitions", which may be the whole tensors)."""

    tensors: list[Tensor]  # the model's parameters, T of them, the same order on every rank
    names: list[str]
    partitions: dict[Tensor, list[_Fragment]]
    process_group: dist.ProcessGroup | None  # None: every rank holds whole tensors


@dataclass(frozen=True)
class _Update:
    """What one parameter group is about to subtract: parallel lists, one entry per fragment."""

    partitions: list[Tensor]  # not per fragment: the partitions that have had their turn
    fragments: list[_Fragment]
    weights: list[Tensor]  # views
    updates: list[Tensor]  # views of u
    lr: float


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv:1904.00962, Algorithm 2); see the head of this file for the equations.

    Works by itself like any torch optimizer. With DeepSpeed, construct it over the model's parameters, give
    it to `deepspeed.initialize` with `"zero_allow_untested_optimizer": true`, then call `bind(engine)` once.

    State per parameter (under ZeRO: per flat partition): `exp_avg` and `exp_avg_sq`, like the parameter in
    shape and dtype; `step`, a Python int. DeepSpeed's ZeRO and universal checkpoints know these names, and an
    int never makes the host wait for the device. `step()` runs no host-device synchronisation and keeps one
    extra buffer of the size of the parameters (the update u) while it runs; gradients are left as they were.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of them; all on one device, gradients dense.
        lr: η. betas: β₁, β₂. eps: ε. weight_decay: λ.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: from `step()`, if ZeRO replaced the parameters and `bind` was not called.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"lr = {lr}: the learning rate must be at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas = {betas}: each must be in [0, 1)")
        if eps < 0.0:
            raise ValueError(f"eps = {eps}: must be at least 0")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay = {weight_decay}: must be at least 0")
        self._pending: list[_Update] = []
        self._trust_ratios: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._layout = _whole_tensors(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this to load a state dict too; only a copied or unpickled optimizer lacks a layout.
        super().__setstate__(state)
        if "_layout" not in self.__dict__:
            self._pending, self._trust_ratios = [], None
            self._layout = _whole_tensors(self.param_groups)

    @property
    def trust_ratios(self) -> Tensor | None:
        """Trust ratios of the last step: fp32 [T] on the parameters' device, equal on all ranks, in the order
        of `tensor_names`; 1 for tensors without a gradient. None before the first step."""
        return self._trust_ratios

    @property
    def tensor_names(self) -> list[str]:
        """Names of the T tensors: DeepSpeed's after `bind`, else those given, else "group.position"."""
        return self._layout.names

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimizer step; `closure`, if given, recomputes the loss, which is returned.

        ZeRO 1 and 2 call this once per parameter group, with the other groups hidden from `param_groups`. The
        updates wait until the last group is in, so that all of them share one all-reduce.

        Raises:
            RuntimeError: not bound under ZeRO; sparse gradients; a ZeRO step that was broken off half-way.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._knows_parameters():
            return loss
        earlier_calls = len(self._pending)
        for group in self.param_groups:
            self._accumulate(group)
        sharded = self._layout.process_group is not None
        if not sharded or sum(len(u.partitions) for u in self._pending) == len(self._layout.partitions):
            self._apply(earlier_calls)
        return loss

    def _knows_parameters(self) -> bool:
        """True if `param_groups` holds what the layout describes; False for DeepSpeed's initial dry step."""
        held = _trained(self.param_groups)
        if all(p in self._layout.partitions for p in held):
            return True
        given = _trained([{"params": self._layout.tensors}])
        if not self.state and [p.shape for p in held] == [t.shape for t in given]:
            # FP16_UnfusedOptimizer (ZeRO 0 in bf16) swaps in fp32 master weights and steps once on zero
            # gradients while `deepspeed.initialize` runs, only to allocate the state. A real step would decay
            # the weights: with g = 0, u = λw and the ratio 1/λ take away η·w. The next call needs `bind`.
            for p in held:
                self._state_of(p)
            return False
        raise RuntimeError(
            "The tensors in param_groups are not the ones Lamb was given: DeepSpeed replaced them by flat "
            "partitions or master weights, whose norms mean nothing. Call maskvr_ds.lamb.bind(engine) once, "
            "right after deepspeed.initialize."
        )

    def _state_of(self, partition: Tensor) -> dict[str, Any]:
        state = self.state[partition]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(partition, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(partition, memory_format=torch.preserve_format)
        return state

    def _accumulate(self, group: dict[str, Any]) -> None:
        """Update m and v of one group's partitions and leave their u in `_pending`."""
        partitions: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not partitions:
            return
        if any(p is waiting for u in self._pending for waiting in u.partitions for p in partitions):
            raise RuntimeError("Lamb.step came twice for one partition before all had their turn")
        gradients = [cast(Tensor, p.grad) for p in partitions]
        if any(g.is_sparse for g in gradients):
            raise RuntimeError("Lamb does not support sparse gradients; use Embedding(sparse=False)")
        (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
        states = [self._state_of(p) for p in partitions]
        for state in states:
            state["step"] += 1
        exp_avgs, exp_avg_sqs = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)

        # u in one buffer: (1 − β₁ᵗ)(√v̂ + ε), then its reciprocal times m, then + λw.
        corrections = [(1 - beta1 ** s["step"], 1 - beta2 ** s["step"]) for s in states]
        updates = list(torch._foreach_sqrt(exp_avg_sqs))
        torch._foreach_mul_(updates, [first / second**0.5 for first, second in corrections])
        torch._foreach_add_(updates, [first * eps for first, _ in corrections])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, exp_avgs)
        if weight_decay != 0:
            torch._foreach_add_(updates, partitions, alpha=weight_decay)

        entry = _Update(partitions, [], [], [], group["lr"])
        for partition, update in zip(partitions, updates, strict=True):
            for fragment in self._layout.partitions[partition]:
                entry.fragments.append(fragment)
                entry.weights.append(fragment.of_partition(partition))
                entry.updates.append(fragment.of_partition(update))
        self._pending.append(entry)

    def _apply(self, earlier_calls: int) -> None:
        """Scale the pending updates by their trust ratios and subtract them from the weights.

        The first `earlier_calls` entries came in before the current call of `step()`: ZeRO has already copied
        those partitions, not yet updated, into the model's weights, so they are copied once more.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        layout = self._layout
        indices = [f.tensor for entry in pending for f in entry.fragments]
        weights = [w for entry in pending for w in entry.weights]
        updates = [u for entry in pending for u in entry.updates]
        count, device = len(layout.tensors), pending[0].partitions[0].device
        squares = torch.cat([_squared_norms(views, indices, count, device) for views in (weights, updates)])
        if layout.process_group is not None:
            dist.all_reduce(squares, group=layout.process_group)
        weight_squares, update_squares = squares.chunk(2)
        defined = (weight_squares > 0) & (update_squares > 0)
        self._trust_ratios = torch.where(defined, weight_squares.sqrt() / update_squares.sqrt(), 1.0)

        ratios = self._trust_ratios.unbind()
        for number, entry in enumerate(pending):
            if not entry.fragments:
                continue  # this rank holds only padding of that group
            scales = [ratios[f.tensor] for f in entry.fragments]
            torch._foreach_addcmul_(entry.weights, entry.updates, scales, value=-entry.lr)
            if number < earlier_calls:
                targets = [f.of_tensor(layout.tensors[f.tensor]) for f in entry.fragments]
                torch._foreach_copy_(targets, entry.weights)


def _squared_norms(views: list[Tensor], indices: list[int], count: int, device: torch.device) -> Tensor:
    """Σx² of each view at the index of its tensor, 0 elsewhere: fp32 [T]."""
    squares = [torch.zeros((), dtype=torch.float32, device=device)] * count
    if views:
        chunks = [x.flatten().split(NORM_CHUNK) if x.numel() > NORM_CHUNK else (x,) for x in views]
        norms = torch.stack(torch._foreach_norm([c for cs in chunks for c in cs], 2, dtype=torch.float32))
        totals = torch._foreach_norm(norms.split([len(cs) for cs in chunks]))
        for index, total in zip(indices, totals, strict=True):
            squares[index] = total
    return torch.stack(squares).square()


def _trained(param_groups: list[dict[str, Any]]) -> list[Tensor]:
    """The tensors of the groups that DeepSpeed's optimizers own: trainable, with at least one element."""
    return [p for group in param_groups for p in group["params"] if p.requires_grad and p.numel() > 0]


def _whole_tensors(param_groups: list[dict[str, Any]]) -> _Layout:
    """The layout without DeepSpeed: every "partition" is a parameter."""
    tensors = [p for group in param_groups for p in group["params"]]
    names: list[str] = []
    for number, group in enumerate(param_groups):
        names += group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
    return _Layout(tensors, names, {p: [_Fragment(i, 0, 0, p.numel())] for i, p in enumerate(tensors)}, None)


def bind(engine: Any) -> None:
    """Tell the engine's `Lamb` where the tensors are after DeepSpeed rearranged them.

    Call it once, right after `deepspeed.initialize`, before or after `engine.load_checkpoint`; harmless where
    nothing was rearranged. Not a collective.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` that was given a `Lamb` as `optimizer`.

    Raises:
        ValueError: the engine's optimizer is not a `Lamb`, or the engine uses something in which the norms
            would be wrong or that is not tested: ZeRO 3, fp16, optimizer offload, ZenFlow, model or pipeline
            parallelism, mixture-of-experts groups.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, Lamb):
        raise ValueError(
            f"bind needs an engine whose optimizer is maskvr_ds.lamb.Lamb, this one's is "
            f"{type(optimizer).__name__}; pass deepspeed.initialize(optimizer=Lamb(parameter_groups(model)))"
        )
    stage = int(engine.zero_optimization_stage())
    unsupported = {
        f"ZeRO stage {stage}": stage not in (0, 1, 2),
        "fp16": engine.fp16_enabled(),
        "optimizer offload": engine.zero_use_cpu_optimizer(),
        "ZenFlow": bool(engine.zenflow),
        "model parallelism": engine.mp_world_size > 1,
        "pipeline parallelism": engine.pipeline_parallelism,
    }
    found = [what for what, used in unsupported.items() if used]
    if found:
        raise ValueError(
            f"Lamb does not support {', '.join(found)}; supported: data parallelism with ZeRO stages 0, 1, 2 "
            "in fp32 and bf16"
        )
    tensors = _trained([{"params": optimizer._layout.tensors}])
    names = [engine.param_names[t] for t in tensors]
    held = _trained(optimizer.param_groups)
    if stage == 0:
        if [p.shape for p in held] != [t.shape for t in tensors]:
            raise ValueError(f"Lamb does not support {type(engine.optimizer).__name__} at ZeRO stage 0")
        partitions = {p: [_Fragment(i, 0, 0, p.numel())] for i, p in enumerate(held)}
        optimizer._layout = _Layout(tensors, names, partitions, None)
        return

    # Stages 1 and 2 (DeepSpeedZeroOptimizer, BF16_Optimizer): one flat partition per group.
    partitions = {p: [] for p in held}
    process_group = tensors[0]._dp_group  # type: ignore[attr-defined]  # set by DeepSpeed's link_hp_params
    for index, tensor in enumerate(tensors):
        if tensor._dp_group is not process_group:  # type: ignore[attr-defined]
            raise ValueError(f"Lamb does not support several data-parallel groups, as for {names[index]}")
        mapping = tensor._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue  # lies wholly on other ranks
        (partition,) = optimizer.param_groups[mapping.param_group_index]["params"]
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        partitions[partition].append(_Fragment(index, outside.start, inside.start, inside.numel))
    # ZeRO links all optimizer state to the parameters when the first group has stepped. That of the other
    # groups must exist by then, or `safe_get_full_optimizer_state` never finds it.
    for p in held:
        optimizer._state_of(p)
    optimizer._layout = _Layout(tensors, names, partitions, process_group)


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """The two parameter groups of BERT training: weight decay on matrices, none on biases and LayerNorms.

    Decay goes to every trainable parameter of two or more dimensions whose name does not end in "bias". Tied
    parameters appear once. An empty group is left out. Names are kept, as torch does, under "param_names".

    Returns: `[{"params": [(name, tensor), …], "weight_decay": weight_decay}, {…, "weight_decay": 0.0}]`.
    """
    decaying: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("bias")
            (decaying if decays else others).append((name, parameter))
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
