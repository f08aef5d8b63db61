"""`Lamb` without DeepSpeed, against the float64 reference."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskvr_ds.lamb import VARIANTS, Lamb, Lars, Variant, parameter_groups
from maskvr_ds.optim import adam_moments, lamb
from maskvr_ds.optim.layerwise import NORM_CHUNK
from tests.reference import lamb as reference_of
from tests.reference.lamb import ReferenceLamb


def set_gradients(weights: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    for w, g in zip(weights, gradients, strict=True):
        w.grad = g


tensors = st.lists(
    st.tuples(
        st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple),
        st.sampled_from(["zero", "small", "normal", "large"]),  # weights
        st.sampled_from(["zero", "small", "normal", "large", "intermittent"]),  # gradients
        st.booleans(),  # weight decay
    ),
    min_size=1,
    max_size=6,
)
SCALES = {"zero": 0.0, "small": 1e-4, "normal": 1.0, "large": 1e3, "intermittent": 1.0}


def draw(random: np.random.Generator, shape: tuple[int, ...], kind: str, step: int = 0) -> torch.Tensor:
    scale = 0.0 if kind == "intermittent" and step % 2 else SCALES[kind]
    return torch.from_numpy(np.asarray(scale * random.standard_normal(shape), np.float32))


def groups_by_decay(weights: list[nn.Parameter], decay: list[float]) -> list[dict[str, Any]]:
    return [
        {"params": [w for w, d in zip(weights, decay, strict=True) if d == value], "weight_decay": value}
        for value in (0.1, 0.0)
    ]


BING_BERT = Variant(bias_correction="none", min_ratio=0.01, max_ratio=0.3)
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "paper": (lambda *args: Lamb(*args), reference_of.ReferenceLamb),
    "nvidia": (lambda *args: Lamb(*args, variant="nvidia"), reference_of.ReferenceNvidiaLamb),
    "deepspeed": (lambda *args: Lamb(*args, variant="deepspeed"), reference_of.ReferenceDeepSpeedLamb),
    "bing_bert": (lambda *args: Lamb(*args, variant=BING_BERT), reference_of.ReferenceBingBertLamb),
    "lars": (lambda groups, lr, betas, _: Lars(groups, lr, betas[0]), reference_of.ReferenceLars),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tensors=tensors,
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.8, 0.95)]),
    eps=st.sampled_from([1e-6, 1e-3]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(name: str, tensors: Any, betas: tuple[float, float], eps: float, seed: int) -> None:
    random = np.random.default_rng(seed)

    weights = [nn.Parameter(draw(random, shape, kind)) for shape, kind, _, _ in tensors]
    decay = [0.1 if decays else 0.0 for *_, decays in tensors]
    groups = groups_by_decay(weights, decay)
    make, reference_class = OPTIMIZERS[name]
    optimizer = make(groups, 0.01, betas, eps)
    reference = reference_class([w.data for w in weights], decay, 0.01, betas, eps)
    for step in range(6):
        gradients = [draw(random, shape, kind, step) for shape, _, kind, _ in tensors]
        set_gradients(weights, [g.clone() for g in gradients])
        optimizer.step()
        reference.step(gradients)
        for w, g, expected in zip(weights, gradients, reference.weights, strict=True):
            assert w.grad is not None
            assert torch.equal(w.grad, g), "gradients are not modified"
            # Relative to the tensor's largest element: one that passes through 0 keeps its earlier rounding errors.
            largest = max(float(expected.abs().max()), 0.01)
            torch.testing.assert_close(w.double(), expected, rtol=0, atol=1e-5 * largest)
    order = [i for group in groups for p in group["params"] for i, w in enumerate(weights) if w is p]
    assert optimizer.trust_ratios is not None
    expected_ratios = torch.tensor([reference.ratios[i] for i in order])  # loose: m may cancel
    torch.testing.assert_close(optimizer.trust_ratios, expected_ratios, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("overwrites", [False, True])
def test_pieces_are_equal_to_whole_tensors(overwrites: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: large tensors are updated by pieces on CPUs; tensors with gaps in memory as they are."""
    torch.manual_seed(0)
    shapes = [(5_000,), (37, 41), (64,)]
    ends = []
    for piece in (1 << 8, 1 << 30):
        monkeypatch.setattr(lamb, "PIECE", piece)
        monkeypatch.setattr(adam_moments, "PIECE", piece)
        generator = torch.Generator().manual_seed(1)
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        weights.append(nn.Parameter(torch.randn(50, 30, generator=generator).t()))
        optimizer = Lamb(groups_by_decay(weights, [0.1, 0.0, 0.1, 0.1]), 0.01)
        optimizer.overwrites_gradients = overwrites
        for _ in range(3):
            # Laid out as the weights: else u has the layout of the gradient, and its norm another order of sums.
            gradients = [torch.empty_like(w.data).normal_(generator=generator) for w in weights]
            set_gradients(weights, [g.clone() for g in gradients])
            optimizer.step()
            kept = [torch.equal(w.grad, g) for w, g in zip(weights, gradients, strict=True) if w.grad is not None]
            # Where there are pieces, u is written to the gradient.
            assert all(kept) == (not overwrites or piece == 1 << 30)
        ends.append([*weights, *(m for state in optimizer.state.values() for m in list(state.values())[1:])])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_variants_differ_as_documented() -> None:
    """One step from the same weights; the ratios distinguish all switches."""
    ratios = {}
    for name in OPTIMIZERS:
        matrix, bias = nn.Parameter(torch.full((4, 4), 2.0)), nn.Parameter(torch.full((4,), 3.0))
        optimizer = OPTIMIZERS[name][0](
            [{"params": [matrix], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}],
            0.01,
            (0.9, 0.999),
            1e-6,
        )
        set_gradients([matrix, bias], [torch.full((4, 4), 5.0), torch.full((4,), 1.0)])
        optimizer.step()
        ratios[name] = tuple(round(x, 4) for x in optimizer.trust_ratios.tolist())
    assert ratios["paper"] == (1.6667, 3.0)  # u = 1 + 0.1 · 2 and 1
    assert ratios["nvidia"] == (1.6667, 1.0)  # Adam ignores the gradients' scale; no decay, no adaptation
    assert ratios["deepspeed"] == (0.5948, 0.9487)  # u = 0.1 / √0.001 + 0.2 = 3.3623 and 3.1623
    assert ratios["bing_bert"] == (0.3, 0.3)  # the same, clamped
    assert ratios["lars"] == (3.8462, 30.0)  # m = 0.1 (5 + 0.2) and 0.1
    assert set(VARIANTS) == {"paper", "nvidia", "deepspeed"}


def test_tensor_without_gradient_stays_and_steps_later() -> None:
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Lamb([("a", a), ("b", b)], lr=0.1)
    reference = ReferenceLamb([b.data], [0.01], 0.1, (0.9, 0.999), 1e-6)
    a.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert torch.equal(b.data, torch.tensor([1.0, 2.0]))
    assert optimizer.tensor_names == ["a", "b"]
    assert optimizer.trust_ratios is not None
    assert optimizer.trust_ratios[1] == 1
    for gradient in (torch.tensor([0.5, 0.25]), torch.tensor([0.5, -0.25])):
        a.grad, b.grad = torch.tensor([1.0, -1.0]), gradient
        optimizer.step()
        reference.step([gradient])
    torch.testing.assert_close(b.data.double(), reference.weights[0], rtol=1e-6, atol=0)
    assert [optimizer.state[p]["step"] for p in (a, b)] == [3, 2]


def test_norm_of_a_large_tensor_keeps_its_digits() -> None:
    """Plain fp32 norms on CPUs are wrong in the fourth digit here; the ratio must not be."""
    weight = nn.Parameter(torch.rand(24 * NORM_CHUNK + 7, generator=torch.Generator().manual_seed(0)) + 0.5)
    expected = float(weight.detach().double().norm()) / weight.numel() ** 0.5
    optimizer = Lamb([weight], lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 2.0)  # u = 1 everywhere
    optimizer.step()
    assert optimizer.trust_ratios is not None
    assert optimizer.trust_ratios.item() == pytest.approx(expected, rel=1e-6)


def test_bf16_parameters_without_masters() -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 33).bfloat16())
    optimizer = Lamb([weight], lr=0.1)
    reference = ReferenceLamb([weight.data], [0.01], 0.1, (0.9, 0.999), 1e-6)
    gradient = torch.linspace(2, -1, 33).bfloat16()
    weight.grad = gradient
    optimizer.step()
    reference.step([gradient])
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.double(), reference.weights[0], rtol=2e-2, atol=5e-3)


def test_state_dict_continues_bit_equal() -> None:
    def run(optimizer: Lamb, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.sin(torch.arange(12.0) + step)
            optimizer.step()

    one = nn.Parameter(torch.linspace(-1, 2, 12))
    first = Lamb([one], lr=0.1)
    run(first, one, range(3))
    two = nn.Parameter(one.detach().clone())
    second = Lamb([two], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, one, range(3, 6))
    run(second, two, range(3, 6))
    assert torch.equal(one, two)
    assert set(first.state[one]) == {"step", "exp_avg", "exp_avg_sq"}
    assert first.state[one]["step"] == 6


def test_copied_optimizer_works() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    duplicate = copy.deepcopy(Lamb([weight], lr=0.1, variant="nvidia"))
    assert duplicate.variant == VARIANTS["nvidia"]
    (copied,) = duplicate.param_groups[0]["params"]
    copied.grad = torch.ones(3)
    duplicate.step()
    assert torch.equal(weight.data, torch.ones(3))
    assert not torch.equal(copied.data, torch.ones(3))


def test_later_groups_and_closures() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lamb([a], lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.2, "weight_decay": 0.0})

    def closure() -> float:
        optimizer.zero_grad()
        loss = (a * a).sum() + (b * b).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert optimizer.tensor_names == ["0.0", "1.0"]
    torch.testing.assert_close(a.data, torch.full((2,), 0.9))
    torch.testing.assert_close(b.data, torch.full((2,), 0.8))


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-6},
        {"weight_decay": -1},
        {"variant": "apex"},
    ],
)
def test_bad_hyperparameters(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Lamb([nn.Parameter(torch.ones(1))], **arguments)


@pytest.mark.parametrize(
    ("switches", "rule"),
    [
        ({"min_ratio": 2.0, "max_ratio": 1.0}, "min_ratio 2, max_ratio 1"),
        ({"min_ratio": -1.0}, "min_ratio -1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm -1"),
    ],
)
def test_bad_variants(switches: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Variant(**switches)


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -1}])
def test_bad_hyperparameters_of_lars(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Lars([nn.Parameter(torch.ones(1))], **arguments)


class RecordOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_step_does_not_synchronise() -> None:
    """On GPUs each of these operators would make the host wait for the device."""
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.zeros(5))]
    set_gradients(weights, [torch.ones(3, 2), torch.ones(5)])
    optimizer = Lamb(weights)
    with RecordOperators() as operators:
        optimizer.step()
        optimizer.step()
    assert "_foreach_lerp_.Scalar" in operators.names
    waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_to_copy", "unique", "masked_select")
    assert not [name for name in operators.names if name.split(".")[0] in waiting]


def test_sparse_gradients_are_an_error() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = Lamb(embedding.parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_replaced_parameters_are_an_error() -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    optimizer = Lamb([weight])
    flat = nn.Parameter(torch.ones(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"maskvr_ds\.lamb\.bind"):
        optimizer.step()
    assert torch.equal(flat.data, torch.ones(4))


def test_actions_on_replaced_parameters_are_errors() -> None:
    optimizer = Lamb([nn.Parameter(torch.ones(4, 2))])
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(4))]
    with pytest.raises(RuntimeError, match="can no longer add a parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(RuntimeError, match="can no longer be copied or pickled"):
        copy.deepcopy(optimizer)


def two_groups() -> tuple[Lamb, list[nn.Parameter]]:
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    set_gradients(weights, [torch.ones(2), torch.ones(2)])
    groups = [{"params": [weights[0]], "weight_decay": 0.5}, {"params": [weights[1]], "weight_decay": 0.0, "lr": 0.2}]
    return Lamb(groups, lr=0.1), weights


@pytest.mark.parametrize(("set_afterwards", "rates"), [(None, [0.05, 0.1]), ([0.3, 0.7], [0.3, 0.7])])
def test_overwritten_group_settings_are_restored(set_afterwards: Any, rates: list[float]) -> None:
    """As DeepSpeed does when it loads a universal checkpoint at stage 3: all groups get the settings of the first."""
    optimizer, _ = two_groups()
    loaded = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} | {"lr": 0.05}
    for number, group in enumerate(optimizer.param_groups):
        group.update(loaded)
        if set_afterwards:
            group["lr"] = set_afterwards[number]
    with pytest.warns(UserWarning, match="restored as constructed"):
        optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)


def test_state_of_another_optimizer_loads() -> None:
    optimizer, weights = two_groups()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["group_index"]
    optimizer.load_state_dict(state)
    optimizer.step()
    assert not torch.equal(weights[1].data, torch.ones(2))


def test_divergence_is_visible_in_trust_ratios() -> None:
    optimizer, weights = two_groups()
    weights[0].grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert optimizer.trust_ratios is not None
    assert optimizer.trust_ratios.isnan().tolist() == [True, False]


def test_parameter_groups() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7))
    model[3].weight = model[0].weight  # tied
    model[1].bias.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.3)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "1.weight"],
        ["2.weight", "2.bias", "3.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert Lamb(groups).tensor_names == ["0.weight", "1.weight", "2.weight", "2.bias", "3.bias"]
    assert len(parameter_groups(nn.Linear(2, 2, bias=False))) == 1
    # A matrix by shape, a bias by name.
    by_name = nn.ParameterDict({"position_bias": torch.ones(3, 4), "table": torch.ones(3, 4)})
    assert [[name for name, _ in group["params"]] for group in parameter_groups(by_name)] == [
        ["table"],
        ["position_bias"],
    ]
