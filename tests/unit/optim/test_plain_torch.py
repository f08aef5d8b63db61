"""The optimizers as users of plain PyTorch construct, feed, interrupt and reload them."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskvr_ds.lamb import Lamb, Lars, Variant, parameter_groups
from maskvr_ds.optim.stable_adamw import StableAdamW
from tests.reference.lamb import ReferenceLamb

OPTIMIZERS: dict[str, Any] = {
    "lamb": Lamb,
    "nvidia": lambda params, **settings: Lamb(params, variant="nvidia", **settings),
    "lars": Lars,
    "stable_adamw": StableAdamW,
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def step(optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    """With gradients that depend on the number of the tensor only."""
    for _ in range(count):
        for group in optimizer.param_groups:
            for number, p in enumerate(group["params"]):
                p.grad = torch.full_like(p, number + 0.5)
        optimizer.step()


@every
@pytest.mark.parametrize(
    ("group", "rule"),
    [
        ({"lr": -1.0}, "lr = -1"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": "1e-3"}, "lr = '1e-3': .* and a number"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"maximize": True}, "maximize = True: not supported"),
    ],
)
def test_settings_of_groups_are_checked(make: Any, group: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make([{"params": [nn.Parameter(torch.ones(1))], **group}])
    optimizer = make([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=rule):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "betas", [0.9, (0.9,), (0.9, 0.99, 0.999), (0.9, float("nan")), ("0.9", "0.99"), torch.ones(2) / 2]
)
def test_betas_are_two_numbers(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas( =|\[[01]\] =) "):
        Lamb([nn.Parameter(torch.ones(1))], betas=betas)


@every
@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
def test_numbers_of_numpy_and_rates_in_tensors(make: Any, number: Any) -> None:
    ours, theirs = model(), model()
    betas = {} if make is Lars or number is torch.tensor else {"betas": (number(0.5), number(0.75))}
    first = make(ours.parameters(), lr=number(0.125), weight_decay=0.25, **betas)
    second = make(theirs.parameters(), lr=0.125, weight_decay=0.25, **({"betas": (0.5, 0.75)} if betas else {}))
    step(first, 2)
    step(second, 2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_no_variant() -> None:
    with pytest.raises(ValueError, match="variant = None: must be a Variant, or one of paper"):
        Lamb([nn.Parameter(torch.ones(1))], variant=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias_correction 'both': must be one of moments, rate, none"):
        Variant(bias_correction="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_grad_norm nan"):
        Variant(max_grad_norm=float("nan"))


def test_float64() -> None:
    random = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=random)) for shape in ((5, 3), (7,), ())]
    optimizer = Lamb(weights, lr=0.1)
    reference = ReferenceLamb([w.data for w in weights], [0.01] * 3, 0.1, (0.9, 0.999), 1e-6)
    for _ in range(4):
        gradients = [torch.randn(w.shape, dtype=torch.float64, generator=random) for w in weights]
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g
        optimizer.step()
        reference.step(gradients)
    for w, expected in zip(weights, reference.weights, strict=True):
        torch.testing.assert_close(w.data, expected, rtol=0, atol=1e-6)


@every
def test_float64_next_to_float32(make: Any) -> None:
    single, double = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make([single, double])
    for p in (single, double):
        p.grad = torch.tensor([1.0, 2.0, -3.0], dtype=p.dtype)
    optimizer.step()
    torch.testing.assert_close(single.data.double(), double.data, rtol=1e-6, atol=0)


@every
def test_complex_parameters_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=r"phase: .* does not support torch.complex64"):
        make([("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))])


@every
def test_shards_of_fsdp_are_refused(make: Any) -> None:
    """FSDP1 marks its shards; those of a tensor would get a ratio on each rank."""
    shard = nn.Parameter(torch.ones(3))
    shard._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"layer\.weight: is sharded by FSDP"):
        make([("layer.weight", shard)])


@every
def test_a_sparse_gradient_changes_nothing(make: Any) -> None:
    """Found before other groups have moved their moments."""
    dense, embedding = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)
    optimizer = make([{"params": dense.parameters()}, {"params": embedding.parameters()}])
    dense(embedding(torch.tensor([1, 3]))).sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
    assert not optimizer.state
    embedding.weight.grad = torch.ones(5, 2)
    optimizer.step()


@every
def test_an_interrupted_step_can_be_followed_by_others(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C in a notebook, or for want of memory."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make([{"params": [p]} for p in parameters])
    for p in parameters:
        p.grad = torch.ones(3)
    original, calls = type(optimizer)._advance, []

    def interrupt(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(optimizer), "_advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(torch.equal(p.data, torch.ones(3)) for p in parameters)
    optimizer.step()
    assert all((p.data < 1).all() for p in parameters)


@every
def test_loading_forgets_an_interrupted_step(make: Any) -> None:
    optimizer = make([nn.Parameter(torch.ones(3))])
    optimizer._pending = ["the first of two partitions"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._pending == []


@every
def test_state_survives_a_file_of_weights_only(make: Any) -> None:
    ours, theirs = model(), model()
    first, second = make(parameter_groups(ours)), make(parameter_groups(theirs), lr=0.5)
    step(first, 2)
    theirs.load_state_dict(ours.state_dict())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    step(first, 2)
    step(second, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@every
def test_states_load_one_after_another(make: Any) -> None:
    """accelerate loads an optimizer's own state when it wraps it, whereupon torch adds to the defaults."""
    weights = model()
    state = make(parameter_groups(weights)).state_dict()
    optimizer = make(parameter_groups(weights))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(state)
    copy.deepcopy(optimizer).load_state_dict(state)


@pytest.mark.parametrize("make", [Lamb, StableAdamW])
def test_moments_of_torch_adamw(make: Any) -> None:
    """They are continued, with the step as an int as documented."""
    weights = model()
    adamw = torch.optim.AdamW(parameter_groups(weights))
    step(adamw, 3)
    optimizer = make(parameter_groups(weights))
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for p, state in adamw.state.items():
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], state["exp_avg_sq"])
    step(optimizer, 2)
    assert [(type(state["step"]), state["step"]) for state in optimizer.state.values()] == [(int, 5)] * 6


def test_states_of_other_optimizers_are_refused() -> None:
    weights = model()
    lamb, lars = Lamb(weights.parameters()), Lars(weights.parameters())
    with pytest.raises(ValueError, match=r"parameter group 0 of the state dict has no betas, eps: .*Lamb"):
        lamb.load_state_dict(lars.state_dict())
    with pytest.raises(ValueError, match=r"has no momentum: .*Lars"):
        lars.load_state_dict(lamb.state_dict())
    with pytest.raises(ValueError, match="amsgrad = True: not supported"):
        lamb.load_state_dict(torch.optim.AdamW(weights.parameters(), amsgrad=True).state_dict())


@every
def test_edited_groups_are_an_error_at_the_first_step(make: Any) -> None:
    """Also if the shapes are equal: DeepSpeed's dry step, which is skipped, has gradients of zero."""
    optimizer, other = make(model().parameters()), model()
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(RuntimeError, match="Without DeepSpeed: param_groups was edited; use add_param_group"):
        step(optimizer)


def test_a_compiled_step_is_the_step() -> None:
    ours, theirs = model(), model()
    compiled, plain = Lamb(parameter_groups(ours)), Lamb(parameter_groups(theirs))
    compiled_step = torch.compile(lambda: compiled.step(), backend="eager")
    for number in range(3):
        for p in [*ours.parameters(), *theirs.parameters()]:
            p.grad = torch.full_like(p, number + 0.5)
        compiled_step()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_rms_of_an_empty_tensor() -> None:
    optimizer = StableAdamW([nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(3))])
    step(optimizer)
    assert optimizer.update_rms is not None
    assert optimizer.update_rms.tolist() == pytest.approx([0, 1])
