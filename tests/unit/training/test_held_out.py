"""Held-out figures against transformers' own forward pass over complete rows, and by enumeration."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from data_pipeline.reports.describe import describe
from data_pipeline.shards import Corpus
from maskvr_ds.data.vocabulary import unigram_entropy
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.training.held_out import KINDS, HeldOut
from tests.support.corpora import MASK, PAD, SPECIAL, make_corpus

WORDS, LENGTH = 12, 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    return Corpus(make_corpus(folder, rows=80, length=LENGTH, words=WORDS, padded_last_row=True))


def make_model() -> MaskedLanguageModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + len(SPECIAL),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
    )
    return MaskedLanguageModel(config)


def held_out(corpus: Corpus, **options: int) -> HeldOut:
    sizes = {"rows": 70, "micro_size": 16, "rank": 0, "world_size": 1, **options}
    return HeldOut(corpus, device=torch.device("cpu"), **sizes)


def reference(model: BertForMaskedLM, evaluation: HeldOut) -> dict[str, list[tuple[float, bool]]]:
    """Kind -> (loss, hit) of each prediction, one row and one position at a time, from logits over all positions."""
    found: dict[str, list[tuple[float, bool]]] = {kind: [] for kind in KINDS}
    for masked in evaluation._batches():
        with torch.no_grad():
            logits = model(input_ids=masked.input_ids, attention_mask=(masked.input_ids != PAD).long()).logits.numpy()
        for b, k in np.argwhere(masked.weights.numpy() != 0):
            at, label = int(masked.positions[b, k]), int(masked.labels[b, k])
            seen, scores = int(masked.input_ids[b, at]), logits[b, at].astype(np.float64)
            kind = "mask" if seen == MASK else "kept" if seen == label else "random"
            loss = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label]
            found[kind].append((float(loss), int(scores.argmax()) == label))
    return found


def test_against_transformers_position_by_position(corpus: Corpus) -> None:
    model, evaluation = make_model(), held_out(corpus)
    figures = evaluation.figures(model)
    by_kind = reference(model.mlm.eval(), evaluation)
    assert all(len(by_kind[kind]) >= 10 for kind in KINDS), "each kind occurs"
    everything = [pair for pairs in by_kind.values() for pair in pairs]
    for suffix, pairs in {"": everything, **{f"_{kind}": pairs for kind, pairs in by_kind.items()}}.items():
        losses, hits = zip(*pairs, strict=True)
        assert figures[f"held_out_loss{suffix}"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert figures[f"held_out_accuracy{suffix}"] == pytest.approx(np.mean(hits), rel=1e-9)
    assert figures["held_out_perplexity"] == pytest.approx(math.exp(figures["held_out_loss"]))
    assert model.training, "as before"


def test_what_is_copied_shows_in_its_kind_alone(corpus: Corpus) -> None:
    """A model that predicts what it sees: right on kept tokens, wrong elsewhere."""

    class Copying(torch.nn.Module):
        def forward(
            self, input_ids: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            return 30.0 * torch.nn.functional.one_hot(input_ids.gather(1, positions), WORDS + len(SPECIAL)).float()

    figures = held_out(corpus).figures(Copying())
    assert [figures[f"held_out_accuracy_{kind}"] for kind in KINDS] == [0.0, 1.0, 0.0]
    assert figures["held_out_loss_kept"] < 1e-6 < 29 < figures["held_out_loss_mask"]
    assert 0.05 < figures["held_out_accuracy"] < 0.2


def test_a_kind_without_predictions_has_no_figure(corpus: Corpus) -> None:
    """One row has three predictions."""
    figures = held_out(corpus, rows=1).figures(make_model())
    assert math.isnan(figures["held_out_loss_random"]) or math.isnan(figures["held_out_loss_kept"])
    assert math.isfinite(figures["held_out_loss"])


def test_unigram_entropy_token_by_token(corpus: Corpus) -> None:
    shards = range(len(corpus.manifest.shards))
    tokens = [t for shard in shards for t in corpus.input_ids(shard).ravel().tolist() if t >= len(SPECIAL)]
    counts = Counter(tokens)
    expected = -sum(math.log(counts[token] / len(tokens)) for token in tokens) / len(tokens)
    assert unigram_entropy(corpus) == pytest.approx(expected, rel=1e-9)
    (line,) = [line for line in describe(corpus.folder).splitlines() if line.startswith("unigram entropy")]
    assert line.split()[2] == f"{expected:.3f}"
    assert held_out(corpus).unigram_entropy == unigram_entropy(corpus)
    assert unigram_entropy(corpus) < math.log(WORDS) + 1e-9
