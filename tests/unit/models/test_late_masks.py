"""Late mask tokens against full-length attention that does not see [MASK] in the lower layers; counts; refusals."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from maskvr_ds.config import ConfigError, MaskingConfig, ModelConfig
from maskvr_ds.masking.checks import hidden_positions
from maskvr_ds.models import documents
from maskvr_ds.models.architectures import check_settings
from maskvr_ds.models.capabilities import check_model
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.late_masks import LateMasks, Passage, StagedLayers
from maskvr_ds.planning.sizes import encoder_sizes
from tests.support.architectures import INSTALLED, section
from tests.unit.models.test_architectures import PAD, V, config_of
from tests.unit.models.test_documents import varlen_on_cpu

B, L, K, N, MASK, SEP = 3, 24, 7, 2, 4, 2
CANNOT = {"albert": "has no list of its 3 layers", "deberta-v2": "does not compute the layers below"}
CAN = tuple(name for name in INSTALLED if name not in CANNOT)


def model(architecture: str, late: LateMasks | None, **options: Any) -> MaskedLanguageModel:
    """In float64, without dropout, with attention that is far from uniform."""
    return MaskedLanguageModel(config_of(architecture, initializer_range=0.3), late=late, **options).double().eval()


def rows(counts: tuple[int, ...] = (K, K, K), padding: int = 0) -> tuple[torch.Tensor, ...]:
    """ids with [MASK], int64 [B, L]; positions [B, K]; labels; mask or None. counts: [MASK] of each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (B, L), generator=generator)
    positions = torch.stack([torch.randperm(L - padding - 2, generator=generator)[:K] + 1 for _ in range(B)])
    labels = ids.gather(1, positions)
    for row, places, count in zip(ids, positions, counts, strict=True):
        row[places[:count]] = MASK
    if not padding:
        return ids, positions, labels, None
    ids[1, L - padding :] = PAD
    return ids, positions, labels, ids != PAD


@contextmanager
def reference(module: MaskedLanguageModel, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> Iterator[None]:
    """Within: rows of full length; the first N layers do not attend to `hidden` positions, bool [B, L], whose states
    are those of the embedding layer when they enter layer N."""
    config, embedded = module.mlm.config, [torch.empty(0)]
    seen = ~hidden if attention_mask is None else ~hidden & attention_mask
    places = torch.arange(L)
    distance = (places[:, None] - places).abs()

    def before(number: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args = args or (kwargs.pop("hidden_states"),)
            if number == 0:
                embedded[0] = args[0]
            if number == N:
                return (torch.where(hidden[..., None], embedded[0], args[0]), *args[1:]), kwargs
            mask = seen[:, None, None, :].expand(B, 1, L, L)
            if getattr(config, "layer_types", ["full"] * L)[number] == "sliding_attention":
                mask = mask & (distance <= config.sliding_window)
            mask = mask | torch.eye(L, dtype=torch.bool)
            if module.separator is not None:
                return args, {**kwargs, "document_mask": kwargs["document_mask"] & mask}
            if config._attn_implementation == "eager":
                mask = args[0].new_zeros(()).masked_fill(~mask, torch.finfo(args[0].dtype).min)
            if "attention_mask" in kwargs:
                return args, {**kwargs, "attention_mask": mask}
            return (args[0], mask, *args[2:]), kwargs

        return hook

    hooks = [
        layer.register_forward_pre_hook(before(number), with_kwargs=True)
        for number, layer in enumerate(list(module.layers)[: N + 1])
    ]
    with module.without_late_masks():
        yield
    for each in hooks:
        each.remove()


def losses_and_gradients(module: MaskedLanguageModel, *batch: Any) -> tuple[torch.Tensor, ...]:
    losses = module(*batch)
    names = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((losses * torch.arange(1, K + 1)).sum(), names, allow_unused=True)
    return losses, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)


def compare(module: MaskedLanguageModel, batch: tuple[Any, ...], hidden: torch.Tensor) -> None:
    ours = losses_and_gradients(module, *batch)
    with reference(module, hidden, batch[3]):
        theirs = losses_and_gradients(module, *batch)
    with module.without_late_masks():
        assert (module(*batch) - ours[0]).abs().max() > 1e-3, "the ordinary computation is another one"
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7 * max(1.0, there.abs().max().item()))


@pytest.mark.parametrize("trimmed", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["full", "padded", "more"])
@pytest.mark.parametrize("architecture", CAN)
def test_losses_and_gradients_are_those_of_masked_attention(architecture: str, kind: str, trimmed: bool) -> None:
    """full: every row has as many [MASK] as rows are shorter; padded: one row has padding and fewer [MASK]; more: rows
    have more of them, as in a schedule of rates."""
    module = model(architecture, LateMasks(N, MASK, K - 3 if kind == "more" else K))
    module.trims_late = trimmed
    batch = rows((K, K - 2, K) if kind == "padded" else (K, K, K), 5 if kind == "padded" else 0)
    widths = []
    first = module.layers[0]
    first.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((args or (kwargs["hidden_states"],))[0].shape[1]), with_kwargs=True
    )
    compare(module, batch, batch[0] == MASK)
    assert widths[0] == (L - module.late.hidden if trimmed else L)


@pytest.mark.parametrize("layer", range(1, N + 1))
def test_a_layer_in_training_alone(layer: int) -> None:
    """A model prepared for layer N takes any lower one, in training only; in evaluation it is the ordinary model."""
    late = LateMasks(layer, MASK, K)
    module, other = model("bert", LateMasks(N, MASK, 0)), model("bert", late)
    other.load_state_dict(module.state_dict())
    module.late, module.late_in_training = None, late
    batch = rows()
    trained = module.train()(*batch)
    torch.testing.assert_close(trained, other.train()(*batch), rtol=0, atol=0)
    evaluated = module.eval()(*batch)
    assert (evaluated - trained).abs().max() > 1e-3
    with other.without_late_masks():
        torch.testing.assert_close(evaluated, other.eval()(*batch), rtol=0, atol=0)
    with module.train().without_late_masks():
        torch.testing.assert_close(module(*batch), evaluated, rtol=0, atol=0)
    assert module.late_in_training == late


@pytest.mark.parametrize("trimmed", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta"])
def test_documents_and_their_windows_are_kept(architecture: str, trimmed: bool) -> None:
    module = model(architecture, LateMasks(N, MASK, K - 1), separator=SEP)
    module.trims_late = trimmed
    batch = rows()
    batch[0][:, 10] = batch[0][:, -1] = SEP
    hidden = batch[0] == MASK
    batch[1][hidden.gather(1, batch[1]).logical_not()] = 0
    compare(module, batch, hidden)


@torch.no_grad()
def test_flash_attention_by_document_computes_the_layers_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers below have a mask: their documents do not lie side by side."""
    module = model("modernbert", LateMasks(N, MASK, K - 1), separator=SEP)
    module.trims_late = True
    batch = rows()
    batch[0][:, 10] = batch[0][:, -1] = SEP
    expected, calls = module(*batch), []
    monkeypatch.setattr(documents, "has_varlen", lambda *_: True)
    monkeypatch.setattr(
        documents, "varlen_attn", lambda *args, **options: calls.append(0) or varlen_on_cpu(*args, **options)
    )
    torch.testing.assert_close(module(*batch), expected)
    assert len(calls) == 3 - N


def test_a_row_with_few_masks_gives_up_padding_and_then_tokens_of_its_own() -> None:
    """What a row keeps does not depend on the others."""
    ids, _, _, mask = rows((K, 1, 2), padding=4)

    def kept(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        options = {"predictions": K, "trimmed": True, "eager": False, "document_numbers": None}
        return Passage(LateMasks(N, MASK, K), rows, mask, **options)._kept

    found = kept(ids, mask)
    assert found.shape == (B, L - K)
    assert bool((found.diff(dim=1) > 0).all())
    for number, (row, places) in enumerate(zip(ids, found, strict=True)):
        visible = ((row != MASK) & mask[number]).nonzero().flatten()
        assert set(places.tolist()) <= set(visible.tolist()) or len(visible) < L - K
        assert len(set(visible.tolist()) & set(places.tolist())) == min(len(visible), L - K)
        assert torch.equal(kept(row[None], mask[number][None])[0], places)


def test_tokens_given_up_enter_later_with_their_own_embeddings() -> None:
    module = model("bert", LateMasks(N, MASK, K))
    module.trims_late = True
    batch = rows((K, K - 3, K))
    options = {"predictions": K, "trimmed": True, "eager": False, "document_numbers": None}
    kept = Passage(module.late, batch[0], None, **options)._kept
    hidden = torch.ones(B, L, dtype=torch.bool).scatter_(1, kept, False)
    assert (hidden & (batch[0] != MASK)).sum(1).tolist() == [0, 3, 0]
    compare(module, batch, hidden)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, K), min_size=B, max_size=B), st.booleans(), st.booleans())
def test_splitting_and_joining_changes_no_bit(counts: list[int], trimmed: bool, padded: bool) -> None:
    """At layer 0 the row would be the ordinary one."""
    ids, _, _, mask = rows(tuple(counts), 5 * padded)
    passage = Passage(
        LateMasks(1, MASK, K), ids, mask, predictions=K, trimmed=trimmed, eager=False, document_numbers=None
    )
    hidden = torch.randn(B, L, 6)
    assert torch.equal(passage.enter(1, passage.enter(0, hidden)), hidden)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_rows_without_masks_are_the_ordinary_ones(architecture: str) -> None:
    module = model(architecture, LateMasks(N, MASK, K))
    batch = rows((0, 0, 0))
    with module.without_late_masks():
        expected = module(*batch)
    torch.testing.assert_close(module(*batch), expected)


def test_names_copies_and_recomputed_layers() -> None:
    plain, late = (MaskedLanguageModel(config_of("bert"), late=late) for late in (None, LateMasks(N, MASK, K)))
    again = MaskedLanguageModel(config_of("bert"), late=LateMasks(N, MASK, K), activation_checkpointing=True)
    assert list(plain.state_dict()) == list(late.state_dict())
    again.load_state_dict(late.state_dict())
    batch = rows()
    found = []
    for module in (late, again, copied := copy.deepcopy(late)):
        torch.manual_seed(3)
        module.train()(*batch).sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert isinstance(copied.layers, StagedLayers)
    assert copied.layers is not late.layers
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("hidden", [K, K - 2])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "eurobert"])
def test_flops_are_those_that_torch_counts_in_a_training_step(architecture: str, hidden: int) -> None:
    wide = {"local_attention": 4 * L} if architecture == "modernbert" else {}
    config = config_of(architecture, **wide)
    config._attn_implementation = "eager"
    module = MaskedLanguageModel(config, late=(late := LateMasks(N, MASK, hidden))).train()
    ids, positions, labels, _ = rows()
    with FlopCounterMode(display=False) as counter:
        module(ids, positions, labels).sum().backward()
    counted = counter.get_total_flops() / B
    assert flops_per_sequence(config, L, K, batch=B, late=late) == pytest.approx(counted, rel=0.01)
    assert flops_per_sequence(config, L, K, batch=B) > 1.1 * counted


def test_flops_of_bert_are_the_formula_and_those_of_a_plan() -> None:
    """Of n layers, N without h of L positions: 8 (L − h) D² + 4 (L − h)² D + 4 (L − h) D I each."""
    config = config_of("bert")
    n, D, I, h = config.num_hidden_layers, config.hidden_size, config.intermediate_size, 5  # noqa: E741

    def layer(length: int) -> int:
        return 8 * length * D * D + 4 * length**2 * D + 4 * length * D * I

    expected = 3 * (N * layer(L - h) + (n - N) * layer(L) + K * (2 * D * D + 2 * D * V))
    assert flops_per_sequence(config, L, K, batch=B, late=LateMasks(N, MASK, h)) == expected
    sizes = encoder_sizes(ModelConfig.model_validate(section("bert")), V)
    assert sizes.flops(L, K, late=(N, h)) == pytest.approx(expected)


def test_flops_of_windows_below_are_of_the_pairs_left_on_average() -> None:
    narrow, wide = (config_of("modernbert", local_attention=reach) for reach in (8, 4 * L))
    late, share = LateMasks(N, MASK, 6), (18 / 24) ** 2
    saved = [
        flops_per_sequence(wide, L, K, batch=B, late=x) - flops_per_sequence(narrow, L, K, batch=B, late=x)
        for x in (None, late)
    ]
    sliding = [number for number, kind in enumerate(narrow.layer_types) if kind == "sliding_attention"]
    below = sum(number < N for number in sliding)
    assert below
    assert saved[1] / saved[0] == pytest.approx((below * share + len(sliding) - below) / len(sliding))


@pytest.mark.parametrize(
    ("masking", "expected"),
    [
        ({"rate": 0.15}, 19),
        ({"rate": 0.3, "final_rate": 0.15}, 19),
        ({"rate": 0.15, "strategy": "fully_explored"}, 18),
        ({"rate": 0.15, "strategy": "auto"}, 18),
        ({"rate": 0.5}, 63),
    ],
)
def test_positions_hidden_are_those_of_every_mask(masking: dict[str, Any], expected: int) -> None:
    assert hidden_positions(MaskingConfig.model_validate(masking), 128) == expected


@pytest.mark.parametrize("architecture", INSTALLED)
def test_architectures_are_checked_or_refused_by_name(architecture: str) -> None:
    late = LateMasks(N, MASK, K)
    if architecture not in CANNOT:
        assert check_model(MaskedLanguageModel(config_of(architecture), late=late), L, torch.float32) == []
        return
    with pytest.raises(ConfigError, match=rf"masking.late_layer 2: {architecture} .*{CANNOT[architecture]}.* to 0, or"):
        check_model(MaskedLanguageModel(config_of(architecture), late=late), L, torch.float32)


@pytest.mark.parametrize("separator", [None, SEP])
def test_a_wrong_window_is_noticed(separator: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows over the positions that are left instead of the original ones."""
    module = MaskedLanguageModel(
        config_of("modernbert", local_attention=8), late=LateMasks(N, MASK, K), separator=separator
    )
    original = Passage.arguments

    def wrong(self: Passage, *args: Any) -> Any:
        found, kwargs = original(self, *args)
        kwargs.pop("document_positions", None)
        if separator is None and kwargs["attention_mask"] is not None:
            W = kwargs["attention_mask"].shape[3]
            kwargs["attention_mask"] = kwargs["attention_mask"].new_ones(1, 1, W, W).tril(4).triu(-4)
        return found, kwargs

    monkeypatch.setattr(Passage, "arguments", wrong)
    with pytest.raises(ConfigError, match=r"late_layer 2: modernbert .*difference"):
        check_model(module, L, torch.float32)


@pytest.mark.parametrize(("layer", "fits"), [(1, True), (2, True), (3, False), (50, False)])
def test_a_layer_beyond_the_layers_is_refused(layer: int, fits: bool) -> None:
    values = ModelConfig.model_validate(section("roberta"))
    if fits:
        check_settings(values, late_layer=layer)
        return
    with pytest.raises(
        ConfigError, match=rf"masking.late_layer {layer}: .* before the last layer.* 3 layers; .* most 2"
    ):
        check_settings(values, late_layer=layer)
