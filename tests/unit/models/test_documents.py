"""Attention within documents: rows against each document by itself, kernels against each other, pairs enumerated."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.measure import Measurement
from maskvr_ds.analysis.health.probe import _Softmaxes
from maskvr_ds.config import ConfigError
from maskvr_ds.config.strategy_spec import parse_strategies
from maskvr_ds.data.documents import document_lengths
from maskvr_ds.models import documents
from maskvr_ds.models.capabilities import check_model
from maskvr_ds.models.compiled import compile_model
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence, pairs_in_documents
from maskvr_ds.training.health import _eager
from tests.support.architectures import INSTALLED
from tests.support.corpora import make_corpus
from tests.unit.models.test_architectures import PAD, V, config_of

SEP, L, K = 2, 48, 6
# Their attention does not go through transformers' interface.
CANNOT = ("deberta-v2", "mpnet")
CAN = tuple(name for name in INSTALLED if name not in CANNOT)
# Lengths of the documents of two rows; the last one of the second row is padding.
LENGTHS = ((9, 14, 3, 22), (20, 2, 12, 14))


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (2, L), generator=generator)
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[torch.tensor(lengths).cumsum(0) - 1] = SEP
    ids[1, -14:] = PAD
    return ids


def model(architecture: str, **options: Any) -> MaskedLanguageModel:
    """With attention that is far from uniform: large weights."""
    return MaskedLanguageModel(config_of(architecture, initializer_range=0.3), separator=SEP, **options).eval()


def plain(module: MaskedLanguageModel) -> Any:
    """The untouched model of transformers with the same weights."""
    config = copy.deepcopy(module.mlm.config)
    config._attn_implementation = "sdpa"
    found = AutoModelForMaskedLM.from_config(config).eval()
    found.load_state_dict(module.mlm.state_dict())
    return found


def by_themselves(module: MaskedLanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V], one document at a time; of padding, anything."""
    untouched = plain(module)
    logits = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        logits.append(torch.cat([untouched(input_ids=part[None]).logits[0] for part in row.split(lengths)]))
    return torch.stack(logits)


def varlen_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn, document by document: queries [T, H, d] → [T, H, d]."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff()
    assert 0 <= int(lengths.min()) <= int(lengths.max()) <= max_q == max_k
    assert int(cu_seq_q[0]) == 0
    assert int(cu_seq_q[-1]) == len(query)
    found = torch.zeros_like(query)
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        if start == stop:
            continue
        places = torch.arange(stop - start)
        distance = places[:, None] - places
        left, right = window_size
        seen = (torch.tensor(left < 0) | (distance <= left)) & (torch.tensor(right < 0) | (-distance <= right))
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        found[start:stop] = out.transpose(0, 1)
    return found


@pytest.mark.parametrize("kernel", ["mask", "varlen"])
@pytest.mark.parametrize("architecture", CAN)
@torch.no_grad()
def test_a_row_is_each_of_its_documents_by_itself(
    architecture: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ids = model(architecture), rows()
    expected = by_themselves(module, ids)
    monkeypatch.setattr(documents, "has_varlen", lambda *_: kernel == "varlen")
    monkeypatch.setattr(documents, "varlen_attn", varlen_on_cpu)
    used = ids != PAD
    found = module(ids, torch.arange(L).expand(2, L))
    torch.testing.assert_close(found[used], expected[used], atol=1e-4, rtol=0)
    # The rows tell documents apart: attention over rows gives other logits.
    over_rows = plain(module)(input_ids=ids, attention_mask=used).logits
    assert (over_rows - expected)[used].abs().max() > 0.1


@pytest.mark.parametrize("kernel", ["mask", "varlen"])
@pytest.mark.parametrize("architecture", CAN)
@torch.no_grad()
def test_attention_whose_logits_can_be_seen_is_the_same(
    architecture: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As monitor.health_every measures it."""
    module, ids = model(architecture), rows()
    places = torch.arange(L).expand(2, L)
    expected = module(ids, places)
    monkeypatch.setattr(documents, "has_varlen", lambda *_: kernel == "varlen")
    with _eager(module), _Softmaxes() as seen:
        found = module(ids, places)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len(seen.entropies) == module.mlm.config.num_hidden_layers
    assert module.mlm.config._attn_implementation == documents.DOCUMENTS


@pytest.mark.parametrize("architecture", CANNOT)
def test_attention_that_cannot_be_replaced_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(ConfigError, match=f"data.attention is documents, and {architecture} of transformers computes"):
        model(architecture)


@pytest.mark.parametrize("architecture", CAN)
def test_the_check_at_the_start_accepts_what_is_right(architecture: str) -> None:
    module = MaskedLanguageModel(config_of(architecture), separator=SEP)
    assert check_model(module, L, torch.bfloat16, torch.device("cuda")) == []
    assert module.mlm.config._attn_implementation == documents.DOCUMENTS


def test_the_check_at_the_start_finds_positions_and_attention_across_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(documents, "positions", lambda first: torch.arange(first.shape[1]).expand_as(first))
        with pytest.raises(ConfigError, match=r"bert of transformers computes other hidden states .* cross their"):
            check_model(model("bert"), L, torch.float32)
    monkeypatch.setattr(documents, "block_mask", lambda first: torch.ones((len(first), 1, L, L), dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"nomic_bert of transformers computes other hidden states"):
        check_model(model("nomic_bert"), L, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(documents, "first_position", lambda _: 0)
        with pytest.raises(ConfigError, match=r"roberta of transformers computes other hidden states"):
            check_model(model("roberta"), L, torch.float32)


def test_the_check_at_the_start_tells_tokens_of_different_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions: a token seen in place of another one of the same kind changes next to nothing."""
    right = documents.block_mask

    def exchanged(first: torch.Tensor) -> torch.Tensor:
        keys = torch.arange(L)
        keys[[1, L // 2]] = keys[[L // 2, 1]]
        return right(first)[..., keys]

    monkeypatch.setattr(documents, "block_mask", exchanged)
    with pytest.raises(ConfigError, match=r"nomic_bert of transformers computes other hidden states"):
        check_model(MaskedLanguageModel(config_of("nomic_bert"), separator=SEP), L, torch.float32)


def test_dropout_of_attention_weights_is_refused_for_varlen_only() -> None:
    module = MaskedLanguageModel(config_of("bert", attention_probs_dropout_prob=0.1), separator=SEP)
    assert check_model(module, L, torch.float32, torch.device("cuda")) == []
    assert check_model(module, L, torch.bfloat16, torch.device("cpu")) == []
    with pytest.raises(ConfigError, match=r"without dropout of attention weights, and that .* is 0.1; set it"):
        check_model(module, L, torch.bfloat16, torch.device("cuda"))
    # Again without an error: the kernel is registered again.
    module(rows(), torch.zeros((2, 1), dtype=torch.long))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from([SEP, PAD, 7, 8]), min_size=9, max_size=9), min_size=1, max_size=4))
def test_offsets_and_mask_and_positions_are_of_the_same_documents(ids: list[list[int]]) -> None:
    """Against a loop over the tokens, also for separators in all places."""
    first = documents.starts(torch.tensor(ids), SEP)
    starts: list[int] = []
    for b, row in enumerate(ids):
        number = start = 0
        for i, token in enumerate(row):
            follows = i == 0 or (row[i - 1] == SEP and (token != SEP or i == len(row) - 1))
            if follows:
                starts.append(b * len(row) + i)
                number, start = number + 1, i
            assert int(documents.positions(first)[b, i]) == i - start
            assert bool(documents.block_mask(first)[b, 0, start, i])
            assert start == 0 or not bool(documents.block_mask(first)[b, 0, start - 1, i])
    found = documents.offsets(first).tolist()
    assert found[: len(starts)] == starts
    assert set(found[len(starts) :]) == {len(ids) * len(ids[0])}


@pytest.mark.parametrize("architecture", sorted(set(CAN) - {"albert"}))
def test_activation_checkpointing_changes_no_gradient(architecture: str) -> None:
    gradients = []
    ids, positions = rows(), torch.arange(K).expand(2, K)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = model(architecture, activation_checkpointing=checkpointing).train()
        module(ids, positions, labels=ids[:, :K]).sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled(how: Any) -> None:
    """The same gradients, and no further graph for other documents."""
    module, ids, positions = model("modernbert"), rows(), torch.arange(K).expand(2, K)
    expected = torch.autograd.grad(module(ids, positions, labels=ids[:, :K]).sum(), list(module.parameters()))
    compile_model(module, how)
    module(ids.flip(0), positions, labels=ids[:, :K]).sum().backward()
    module.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        module(ids, positions, labels=ids[:, :K]).sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reach", [None, 0, 1, 4, 11, 100])
def test_pairs_in_documents_are_those_enumerated(reach: int | None) -> None:
    """Of the mask that layers attend by."""
    mask = documents.block_mask(documents.starts(rows(), SEP))
    places = torch.arange(L)
    if reach is not None:
        mask = mask & ((places[:, None] - places).abs() <= reach)
    lengths = np.array([n for row in LENGTHS for n in row])
    assert pairs_in_documents(lengths, reach) == int(mask.sum())


@pytest.mark.parametrize("architecture", CAN)
def test_flops_count_the_pairs_within_documents(architecture: str) -> None:
    config = config_of(architecture)
    lengths = np.array([n for row in LENGTHS for n in row])
    whole, found = (
        flops_per_sequence(config, L, K, batch=2, documents=given) for given in (None, (lengths, len(LENGTHS)))
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    fewer = 0.0
    for kind in kinds:
        near = {(i, j) for i in range(L) for j in range(L)}
        if kind == "sliding_attention":
            near = {(i, j) for i, j in near if abs(i - j) <= config.sliding_window}
        mask = documents.block_mask(documents.starts(rows(), SEP))[:, 0]
        fewer += len(near) - sum(int(mask[:, i, j].sum()) for i, j in near) / len(mask)
    assert whole - found == pytest.approx(3 * 4 * width * fewer, rel=1e-9)


def test_lengths_of_a_corpus_are_those_of_its_rows(tmp_path: Path) -> None:
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=60, length=32, padded_last_row=True))
    ids = np.empty((60, 32), corpus.dtype)
    corpus.take(np.arange(60), out=ids)
    first = documents.starts(torch.from_numpy(ids.astype(np.int64)), corpus.manifest.special_tokens.sep)
    lengths, number = document_lengths(corpus)
    assert number == 60
    assert lengths.sum() == 60 * 32
    assert lengths.tolist() == documents.offsets(first).diff()[: int(first.sum())].tolist()


def test_costs_of_strategies_count_the_pairs_within_documents(tmp_path: Path) -> None:
    """As `maskvr variance` compares them."""
    corpus, config = Corpus(make_corpus(tmp_path / "corpus", rows=60, padded_last_row=True)), config_of("bert")
    lengths, number = document_lengths(corpus)
    options: dict[str, Any] = {"sample": SimpleNamespace(corpus=corpus, micro_size=2), "rate": lambda _: 0.25}
    options |= {"common": {"rate": 0.25}, "state": SimpleNamespace(identity={"masking": {}})}
    found = [
        Measurement.flops(
            cast("Measurement", SimpleNamespace(model=measured, **options)), parse_strategies(["uniform"])[0]
        )
        for measured in (MaskedLanguageModel(config), MaskedLanguageModel(config, separator=SEP))
    ]
    attended = int((lengths**2).sum()) / number
    fewer = 3 * 4 * config.hidden_size * config.num_hidden_layers * (corpus.sequence_length**2 - attended)
    assert fewer > 0
    assert found[0] - found[1] == pytest.approx(fewer, rel=1e-6)
