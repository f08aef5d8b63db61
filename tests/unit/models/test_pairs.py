"""Losses and gradients of masked tokens and sentence pairs against transformers' own ...ForPreTraining."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.config.objectives import PAIR_CLASSES
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.loader import Loader, read_rows
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.capabilities import check_model
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.initial_folder import InitialWeights, weights_digest
from maskvr_ds.models.losses import losses_and_hits, objective_losses, weighted_loss
from maskvr_ds.models.pretrained import load
from maskvr_ds.training.held_out import HeldOut
from tests.support.architectures import section
from tests.support.pairs import LENGTH, make_pairs

LABEL = {"albert": "sentence_order_label", "bert": "next_sentence_label", "ernie": "next_sentence_label"}
PAIR_MODELS = pytest.mark.parametrize("architecture", PAIR_CLASSES)


@pytest.fixture(scope="module", params=["nsp", "sop"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_pairs(tmp_path_factory.mktemp("pairs") / request.param, request.param, rows=30))


def build(architecture: str, **settings: Any) -> MaskedLanguageModel:
    torch.manual_seed(0)
    model = ModelConfig.model_validate(section(architecture, type_vocab_size=2, **settings))
    return MaskedLanguageModel(transformers_config(model, vocab_size=25, pad_id=0, pair_head=True)).eval()


def batches(corpus: Corpus) -> Iterator[MaskedBatch]:
    rows = np.arange(8)
    masker = Masker.for_corpus(corpus.manifest, seed=0)
    yield masker(read_rows(corpus, rows, np.zeros_like(rows), pairs=True))


def reference_loss(
    model: MaskedLanguageModel, masked: MaskedBatch, corpus: Corpus
) -> tuple[torch.Tensor, torch.nn.Module]:
    """transformers' own loss, the sum of both means, from labels at all positions, and the untouched model."""
    reference = getattr(transformers, PAIR_CLASSES[model.mlm.config.model_type])(copy.deepcopy(model.mlm.config)).eval()
    reference.load_state_dict(model.mlm.state_dict())
    rows = np.arange(8)
    labels = torch.full(masked.input_ids.shape, -100)
    types = torch.zeros_like(masked.input_ids)
    for row in range(len(labels)):
        used = masked.weights[row] != 0
        labels[row, masked.positions[row, used]] = masked.labels[row, used]
        ids = masked.input_ids[row].tolist()
        start = int(corpus.take_column("segment_start", rows)[row])
        types[row, start : ids.index(0) if 0 in ids else None] = 1
    label = torch.from_numpy(corpus.take_column("pair_label", rows)).long()
    options: dict[str, Any] = {LABEL[model.mlm.config.model_type]: label, "token_type_ids": types}
    loss = reference(input_ids=masked.input_ids, attention_mask=masked.attention_mask, labels=labels, **options).loss
    return loss, reference


@PAIR_MODELS
def test_losses_and_gradients_are_those_of_transformers(corpus: Corpus, architecture: str) -> None:
    ours, masked = build(architecture), next(batches(corpus))
    expected, reference = reference_loss(ours, masked, corpus)
    loss, pair_loss = objective_losses(ours, masked)
    assert pair_loss is not None
    total = loss / (masked.weights != 0).sum() + pair_loss / 8
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    total.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.mlm.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@PAIR_MODELS
@torch.no_grad()
def test_logits_are_equal_to_the_bit(corpus: Corpus, architecture: str) -> None:
    ours, masked = build(architecture), next(batches(corpus))
    _, reference = reference_loss(ours, masked, corpus)
    places = torch.arange(LENGTH)
    types = (places >= masked.segment_starts[:, None]) & masked.attention_mask
    theirs = reference(input_ids=masked.input_ids, attention_mask=masked.attention_mask, token_type_ids=types.long())
    _, pair_logits = ours(masked.input_ids, masked.positions, None, masked.attention_mask, masked.segment_starts)
    assert torch.equal(pair_logits, theirs[1])
    losses, hits, again = losses_and_hits(ours, masked)
    assert torch.equal(again, pair_logits)
    assert losses.shape == hits.shape == masked.positions.shape
    loss, _ = objective_losses(ours, masked)
    assert torch.equal(weighted_loss(ours, masked), loss)


@PAIR_MODELS
def test_no_parameter_is_frozen(architecture: str) -> None:
    assert check_model(build(architecture), LENGTH, torch.float32) == []


def test_held_out_figures_are_those_of_single_rows(corpus: Corpus) -> None:
    model = build("bert")
    # As two ranks would see it: the second of three passes is filled up.
    evaluation = HeldOut(corpus, rows=7, micro_size=3, rank=0, world_size=1, device=torch.device("cpu"))
    figures = evaluation.figures(model)
    hits, losses = [], []
    for row in evaluation._mine:
        masked = evaluation.masker(read_rows(corpus, np.array([row]), np.zeros(1, np.int64), pairs=True))
        with torch.no_grad():
            _, logits = model(masked.input_ids, masked.positions, None, masked.attention_mask, masked.segment_starts)
        label = int(corpus.take_column("pair_label", np.array([row]))[0])
        losses.append(-logits.log_softmax(-1)[0, label].item())
        hits.append(logits[0].argmax().item() == label)
    assert figures["held_out_pair_accuracy"] == pytest.approx(np.mean(hits))
    assert figures["held_out_pair_loss"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_ranks_without_further_rows_count_no_pairs(corpus: Corpus) -> None:
    evaluation = HeldOut(corpus, rows=3, micro_size=1, rank=1, world_size=2, device=torch.device("cpu"))
    labels = [masked.pair_labels.tolist() for masked in evaluation._batches(pairs=True)]
    assert [label[0] >= 0 for label in labels] == [True, False]


def test_columns_follow_their_rows(corpus: Corpus) -> None:
    batch = next(Loader(corpus, seed=3, global_size=20, pairs=True).batches())
    rows = batch.sample_ids.numpy()
    assert batch.segment_starts.tolist() == corpus.take_column("segment_start", rows).tolist()
    assert batch.pair_labels.tolist() == corpus.take_column("pair_label", rows).astype(int).tolist()
    # The first token of the second segment follows a [SEP].
    assert (batch.input_ids.long().gather(1, batch.segment_starts[:, None] - 1) == 3).all()


def test_weights_without_a_head_for_pairs_start_it_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert")
    plain = transformers.BertForMaskedLM(copy.deepcopy(model.mlm.config))
    plain.save_pretrained(tmp_path)
    before = copy.deepcopy(model.mlm.state_dict())
    with caplog.at_level("INFO"):
        load(model.mlm, InitialWeights(tmp_path, weights_digest(tmp_path)))
    assert "head for sentence pairs" in caplog.text
    after = model.mlm.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(after[name], tensor), name
    assert torch.equal(after["cls.seq_relationship.weight"], before["cls.seq_relationship.weight"])
    complete = build("bert")
    torch.nn.init.normal_(complete.mlm.cls.seq_relationship.weight)
    complete.mlm.save_pretrained(tmp_path / "complete")
    load(model.mlm, InitialWeights(tmp_path / "complete", weights_digest(tmp_path / "complete")))
    for name, tensor in complete.mlm.state_dict().items():
        assert torch.equal(model.mlm.state_dict()[name], tensor), name


def test_architectures_without_such_a_head_are_refused() -> None:
    model = ModelConfig.model_validate(section("roberta"))
    with pytest.raises(ConfigError, match="roberta of transformers has no binary head"):
        transformers_config(model, vocab_size=25, pad_id=1, pair_head=True)
