"""Compiled regions: which modules, what stays outside, and refusals. Captured by Dynamo, run without code generation:
generated code is tested in tests/distributed/test_compile.py."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.config.training import Compile
from maskvr_ds.masking.gradient_norms import GradientNorms
from maskvr_ds.models import compiled
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel, ask_for_pair_head
from tests.support.architectures import INSTALLED, section

B, L, K, V, PAD = 3, 24, 5, 60, 1
DEFAULT = ("bert", "modernbert")


@pytest.fixture(autouse=True)
def captured_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model(architecture: str, **settings: Any) -> MaskedLanguageModel:
    torch.manual_seed(0)
    values = ModelConfig.model_validate(section(architecture, **settings))
    return MaskedLanguageModel(transformers_config(values, vocab_size=V, pad_id=PAD))


def batch(rows: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, V, (rows, L), generator=random)
    positions = torch.stack([torch.randperm(L - 4, generator=random)[:K] for _ in range(rows)])
    return ids, positions, torch.randint(5, V, (rows, K), generator=random)


@pytest.mark.parametrize("architecture", INSTALLED)
def test_layers_are_found_in_every_architecture(architecture: str) -> None:
    encoder = model(architecture).mlm.base_model
    layers = list(compiled._layers(encoder))
    # ALBERT shares one group among its layers.
    assert len(layers) == (1 if architecture == "albert" else 3)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [name for name, p in encoder.named_parameters() if id(p) not in inside]
    assert outside
    assert not any(word in name for name in outside for word in ("query", "key", "value", ".q.", "qkv")), outside


def test_a_head_that_is_a_product_alone_is_not_compiled() -> None:
    """The compiler refuses torch's own modules."""
    module = model("eurobert")
    compiled.compile_model(module, "layers")
    assert module.mlm.lm_head._compiled_call_impl is None
    module = model("bert")
    compiled.compile_model(module, "layers")
    assert module.mlm.cls._compiled_call_impl is not None


@pytest.mark.parametrize("how", ["layers", "model"])
@pytest.mark.parametrize("architecture", INSTALLED)
def test_training_step_is_that_of_the_model(architecture: str, how: Compile, request: pytest.FixtureRequest) -> None:
    """Losses, gradients and the observer's norms, with and without padding; nothing is compiled after `warm_up`."""
    if architecture not in DEFAULT and not request.config.getoption("--whole-matrix"):
        pytest.skip("--whole-matrix")
    plain, module = model(architecture), model(architecture)
    names = list(module.state_dict())
    compiled.compile_model(module, how)
    before, random_state = [p.clone() for p in module.parameters()], torch.get_rng_state()
    assert compiled.warm_up(module, rows=B, length=L, predictions=K, padded=True) > 0
    assert list(module.state_dict()) == names
    assert all(torch.equal(was, p) and p.grad is None for was, p in zip(before, module.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    graphs = counters["stats"]["unique_graphs"]
    # One per kind of layer, of which ModernBERT has three (the first one lacks a norm), and the head; with padding
    # again.
    assert 1 < graphs <= 2 * 3 + 1
    ids, positions, labels = batch()
    mask = torch.ones((B, L), dtype=torch.bool)
    mask[0, -3:] = False
    with torch.compiler.set_stance("fail_on_recompile"):
        for attention_mask in (None, mask):
            figures = []
            for each in (plain, module):
                norms = GradientNorms()
                each.observer = norms.watch
                losses = each(ids, positions, labels, attention_mask)
                each.zero_grad()
                losses.sum().backward()
                gradients = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
                figures.append((losses.detach(), torch.cat(gradients), norms.take()))
            for theirs, ours in zip(*figures, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        with compiled.uncompiled(module), torch.no_grad():
            ids, positions, _ = batch(rows=1)
            torch.testing.assert_close(module(ids, positions), plain(ids, positions), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("how", ["layers", "model"])
def test_sentence_pairs_are_warmed_up_too(how: Compile) -> None:
    values = ModelConfig.model_validate(section("bert"))
    config = transformers_config(values, vocab_size=V, pad_id=PAD)
    ask_for_pair_head(config)
    torch.manual_seed(0)
    plain = MaskedLanguageModel(config)
    module = MaskedLanguageModel(config)
    module.load_state_dict(plain.state_dict())
    compiled.compile_model(module, how)
    compiled.warm_up(module, rows=B, length=L, predictions=K, padded=False)
    ids, positions, labels = batch()
    with torch.compiler.set_stance("fail_on_recompile"):
        ours, theirs = (each(ids, positions, labels, None, torch.full((B,), L // 2)) for each in (module, plain))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_graphs_do_not_grow_with_the_depth() -> None:
    found = []
    for depth in (2, 12):
        counters.clear()
        torch._dynamo.reset()
        module = model("bert", num_hidden_layers=depth)
        compiled.compile_model(module, "layers")
        compiled.warm_up(module, rows=B, length=L, predictions=K, padded=False)
        found.append(counters["stats"]["unique_graphs"])
    assert found == [2, 2]  # a layer, the head


def test_activations_of_layers_can_be_recomputed() -> None:
    """With dropout: the backward pass must recompute with the random numbers of the forward pass."""
    gradients = []
    for recompute in (False, True):
        torch._dynamo.reset()
        module = model("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
        if recompute:
            module._checkpoint_activations(True)
        compiled.compile_model(module, "layers")
        compiled.warm_up(module, rows=B, length=L, predictions=K, padded=False)
        torch.manual_seed(5)
        module.train()
        module(*batch()).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_none_changes_nothing() -> None:
    module = model("bert")
    compiled.compile_model(module, "none")
    assert not module.is_compiled
    assert counters["stats"] == {}
    with compiled.uncompiled(module), compiled.uncompiled(nn.Linear(1, 1)):
        pass


def test_encoder_without_a_list_of_layers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model("bert")
    monkeypatch.setattr(module.mlm, "bert", nn.Linear(2, 2), raising=True)
    with pytest.raises(ConfigError, match=r"layers, and the encoder of bert has no list of layers"):
        compiled.compile_model(module, "layers")


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break is an error, not a fallback."""
    module = model("bert")

    def breaking(hidden: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        torch._dynamo.graph_break()
        return hidden

    monkeypatch.setattr(module.mlm.bert.encoder.layer[1], "forward", breaking)
    compiled.compile_model(module, "model")
    with pytest.raises(ConfigError, match=r"training\.compile: torch\.compile cannot compile bert here"):
        compiled.warm_up(module, rows=B, length=L, predictions=K, padded=False)


def test_missing_compiler_is_refused() -> None:
    import torch._inductor.config as inductor
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    # Not monkeypatch, which would delete the setting afterwards.
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"training\.compile needs a C\+\+ compiler, and none was found"),
    ):
        compiled.check_compiler(torch.device("cpu"))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_triton_is_needed_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    compiled.check_compiler(torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs Triton"):
        compiled.check_compiler(torch.device("cuda"))
