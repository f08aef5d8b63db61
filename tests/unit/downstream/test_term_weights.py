"""Weights of terms: against scikit-learn, scipy and enumeration; Learning to Weight; rows of a task's table; scores for
masking."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import chi2_contingency
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import mutual_info_score
from torch import nn

from data_pipeline.shards import Corpus
from maskvr_ds.cli.main import main
from maskvr_ds.config import MaskingConfig, RunConfig
from maskvr_ds.data.token_scores import read_token_scores, write_token_scores
from maskvr_ds.downstream import evaluation
from maskvr_ds.downstream.baselines import bag_of_words
from maskvr_ds.downstream.examples import Split, TaskData
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.learning_to_weight import WeightFunction, learn, logits, statistics
from maskvr_ds.downstream.tasks import GLUE, OWN, WEIGHTED_ROWS
from maskvr_ds.downstream.term_weights import (
    WEIGHTS,
    TermCounts,
    chi_square,
    information_gain,
    inverse_document_frequency,
    relevance_frequency,
)
from maskvr_ds.downstream.token_scores import positive
from maskvr_ds.downstream.weighted_words import WeightedWords, weighted_bag
from maskvr_ds.masking.factory import create_masker
from maskvr_ds.masking.parameters import corpus_parameters
from maskvr_ds.training.references import open_corpora
from tests.distributed.training import configuration
from tests.support.corpora import make_corpus
from tests.support.tasks import results, write_sst2, write_tsv


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), terms=st.integers(1, 6), number=st.integers(2, 4), seed=st.integers(0, 999))
def test_weights_by_enumeration(n: int, terms: int, number: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    features = random.integers(0, 3, (n, terms)) * (random.random((n, terms)) < 0.6)
    classes = random.integers(0, number, n)
    counts = TermCounts.of(sparse.csr_matrix(features.astype(float)), classes.tolist(), number)
    occurs = features > 0
    gains, squares, relevances = (f(counts) for f in (information_gain, chi_square, relevance_frequency))
    for t in range(terms):
        assert gains[t] == pytest.approx(mutual_info_score(occurs[:, t], classes), abs=1e-12)
        found, ratios = [], []
        for c in range(number):
            table = [
                [np.sum((occurs[:, t] == x) & ((classes == c) == y)) for y in (True, False)] for x in (True, False)
            ]
            complete = all(map(sum, table)) and all(map(sum, zip(*table, strict=True)))
            found.append(chi2_contingency(table, correction=False).statistic if complete else 0)
            (a, b), (c_, d) = table
            ratios.append(math.log2(2 + a / max(1, b)))
            tpr, fpr = (rate[c, t] for rate in counts.rates)
            assert tpr == pytest.approx(a / (a + c_) if a + c_ else 0)
            assert fpr == pytest.approx(b / (b + d) if b + d else 0)
        assert squares[t] == pytest.approx(max(found), abs=1e-9)
        assert relevances[t] == pytest.approx(max(ratios))


def test_idf_is_that_of_the_bag_of_words(tmp_path: Path) -> None:
    """The rows differ in the weights alone: with idf, they predict the same."""
    data = read_task(GLUE["sst2"], write_sst2(tmp_path / "data", train=200))
    words = WeightedWords(data.task, data.train)
    texts = [text for (text,) in data.train.texts]
    pattern = words._words.token_pattern
    reference = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=pattern).fit(texts)
    counts = TermCounts.of(words.unweighted(data.train), [int(label) for label in data.train.labels], 2)
    words.weights = inverse_document_frequency(counts)
    assert np.allclose(words.weights, reference.idf_)
    assert abs(words.transform(texts) - reference.transform(texts)).max() < 1e-12
    WEIGHTS["idf"] = inverse_document_frequency
    try:
        found = weighted_bag(data, "idf", 0)
    finally:
        del WEIGHTS["idf"]
    assert (found["predictions"], found["strength"]) == bag_of_words(data)


def test_logits_by_hand() -> None:
    """x_t = (1 + log tf) w_t of unit length, then W x + b; gradients reach the network."""
    generator = torch.Generator().manual_seed(0)
    features = sparse.csr_matrix([[1.0, 0, 2, 0], [0, 0, 1.5, 3]])
    values, classifier = torch.rand(4, 3, generator=generator), nn.Linear(4, 2)
    function = WeightFunction(3).eval()
    found = logits(features, function, values, classifier)
    for row, dense in zip(found, features.toarray(), strict=True):
        weights = [function(values[t : t + 1]).item() for t in range(4)]
        x = [value * weight for value, weight in zip(dense, weights, strict=True)]
        length = math.sqrt(sum(y * y for y in x))
        for c in range(2):
            expected = sum(classifier.weight[c, t].item() * x[t] / length for t in range(4)) + classifier.bias[c].item()
            assert row[c].item() == pytest.approx(expected, abs=1e-6)
    found.sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in function.parameters())


def test_statistics() -> None:
    counts = TermCounts(np.array([[1.0, 0], [2, 4]]), np.array([2.0, 4]))
    assert statistics(counts).tolist() == [[0.5, 0.5], [1.0, 0.0]], "of two classes, tpr and fpr of the second"
    three = TermCounts(np.array([[1.0], [0], [3]]), np.array([2.0, 2, 4]))
    assert statistics(three).tolist() == [[0.5, 0, 0.75, 0.5, 4 / 6, 0.25]]


def noisy(n: int, seed: int) -> tuple[sparse.csr_matrix, list[int]]:
    """Two terms that tell the class, among 60 that say nothing; each text has one of the former and many others."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 2, n)
    rows = (random.random((n, 62)) < 0.4).astype(float)
    rows[:, :2] = 0
    rows[np.arange(n), classes] = 1
    return sparse.csr_matrix(rows), classes.tolist()


def test_learned_weights_find_the_terms_that_tell() -> None:
    features, classes = noisy(300, 0)
    learned = learn(features, classes, *noisy(100, 1), number=2, seed=0)
    assert learned.accuracy > 0.95
    weights = learned.function.weights(TermCounts.of(features, classes, 2))
    assert weights[:2].min() > 3 * np.median(weights[2:])
    state = torch.random.get_rng_state()
    again = learn(features, classes, *noisy(100, 1), number=2, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(again.function.weights(TermCounts.of(features, classes, 2)), weights)
    other = learn(features, classes, *noisy(100, 1), number=2, seed=1)
    assert not np.array_equal(other.function.weights(TermCounts.of(features, classes, 2)), weights)


NAMES = [*WEIGHTED_ROWS]


def test_rows_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sst2(tmp_path / "data", train=200)
    words = ["evaluate", "--tasks", "sst2", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "scores")]
    assert main([*words, "--baselines", *NAMES, "--seeds", "3", "--quiet"]) == 0
    first = results(tmp_path / "scores", "sst2")
    assert list(first["rows"]) == ["majority", "bag of words", *WEIGHTED_ROWS.values()]
    runs = {name: len(row["scores"]["accuracy"]["runs"]) for name, row in first["rows"].items()}
    assert runs == dict.fromkeys(first["rows"], 1) | {WEIGHTED_ROWS["ltw"]: 3}
    assert first["rows"][WEIGHTED_ROWS["information_gain"]]["scores"]["accuracy"]["mean"] > 0.9
    # Nothing is repeated; further seeds only add runs.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores" / "runs").rglob("*.json")}
    assert main([*words, "--baselines", *NAMES, "--seeds", "4", "--quiet"]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(list((tmp_path / "scores" / "runs").rglob("*.json"))) == len(files) + 1
    assert "words, learned weights" in capsys.readouterr().out


def test_a_killed_evaluation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sst2(tmp_path / "data", train=100)
    words = ["evaluate", "--tasks", "sst2", "--data", str(tmp_path / "data"), "--baselines", "chi2", "ltw", "--quiet"]
    words += ["--seeds", "3", "--output"]
    assert main([*words, str(tmp_path / "undisturbed")]) == 0
    calls = []

    def killed(data: TaskData, name: str, seed: int) -> dict:
        calls.append((name, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return weighted_bag(data, name, seed)

    monkeypatch.setattr(evaluation, "weighted_bag", killed)
    assert main([*words, str(tmp_path / "killed")]) == 130
    assert main([*words, str(tmp_path / "killed")]) == 0
    assert calls == [("chi2", 0), ("ltw", 0), ("ltw", 1), ("ltw", 1), ("ltw", 2)]
    found, expected = (results(tmp_path / folder, "sst2")["rows"] for folder in ("killed", "undisturbed"))
    assert {name: row["scores"] for name, row in found.items()} == {n: row["scores"] for n, row in expected.items()}


def test_pairs_are_weighted_by_what_differs() -> None:
    split = Split((("a b", "a c"), ("a", "a")), ("x", "y"))
    words = WeightedWords(OWN["classification"], split)
    terms = sorted(words._words.vocabulary_)
    assert terms == ["a", "a b", "a c", "b", "c"]
    assert words.unweighted(split).toarray().tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert words.unweighted(split).nnz == 4


def own_task(folder: Path) -> Path:
    """Two classes of texts, told by w0 and w1; of the tokens of `make_corpus`."""
    random = np.random.default_rng(0)
    for name, n in (("train", 120), ("dev", 20)):
        rows = [[f"w{i % 2} " + " ".join(f"w{j}" for j in random.integers(2, 40, 4)), f"c{i % 2}"] for i in range(n)]
        write_tsv(folder / f"{name}.tsv", [["text", "label"], *rows])
    return folder


@pytest.mark.parametrize("weights", ["ltw", "information_gain"])
def test_scores_for_masking(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str) -> None:
    """The table is accepted by a configuration, and the masks of a training prefer the tokens that tell."""
    corpus, scores = make_corpus(tmp_path / "corpus", words=50), tmp_path / "scores.json"
    words = ["token-scores", "--tokenizer", str(corpus), "--data", str(own_task(tmp_path / "task"))]
    assert main([*words, "--weights", weights, "--output", str(scores)]) == 0
    assert "of which the training set has 40" in capsys.readouterr().out
    table = np.array(json.loads(scores.read_text(encoding="utf-8"))["scores"])
    telling = table[[5, 6]]  # after the special tokens
    assert telling.min() > 2 * np.median(table)
    values = configuration(
        tmp_path / "run", corpus, steps=2, masking={"strategy": "frequency", "frequency": {"scores": str(scores)}},
        evaluation={"every_steps": 0}, schedule={"warmup_steps": 1},
    )  # fmt: skip
    config = RunConfig.model_validate(values)
    opened, _ = open_corpora(config)
    for parameters in (corpus_parameters(config.masking, opened), None):
        if parameters is None:
            parameters = create_masker(config.masking, opened, seed=0, device=torch.device("cpu")).parameters
        assert parameters.token_scores is not None
        assert np.array_equal(parameters.token_scores.numpy(), table)


def test_a_weight_of_0_has_a_score() -> None:
    seen = np.array([True, True, True, False])
    assert positive(np.array([0.0, 2, 4, 9]), seen).tolist() == [2, 2, 4, 2]
    with pytest.raises(ValueError, match="all tokens of the training set have weight 0"):
        positive(np.zeros(4), seen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--tasks", "stsb", "--data", "data", "--output", "o", "--baselines", "ltw"], "stsb: weights of"),
        (["evaluate", "--tasks", "sst2", "--data", "data", "--output", "o"], "nothing to evaluate: name a MODEL"),
        (
            ["token-scores", "--tokenizer", "data", "--data", "data", "--output", "o.json"],
            "data: has no tokenizer.json",
        ),
        (
            [
                "token-scores",
                "--tokenizer",
                "d",
                "--data",
                "d",
                "--weights",
                "chi2",
                "--seed",
                "1",
                "--output",
                "o.json",
            ],
            "--seed has no meaning with --weights chi2",
        ),
    ],
)
def test_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "dev"):
        rows = [["sentence1", "sentence2", "score"], ["a", "b", "1"], ["a", "c", "2"]]
        write_tsv(tmp_path / "data" / "STS-B" / f"{part}.tsv", rows)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


def test_a_damaged_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    words = ["token-scores", "--tokenizer", str(tmp_path), "--data", str(own_task(tmp_path / "task"))]
    assert main([*words, "--output", str(tmp_path / "o.json")]) == 1
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["scores"].pop(), "expected 55 positive numbers"),
        (lambda found: found["scores"].__setitem__(3, 0.0), "expected 55 positive numbers"),
        (lambda found: found.update(tokenizer_sha256="0" * 64), "is for the tokenizer 000000000000"),
        (lambda found: found.pop("scores"), "is no table of token scores"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_scores_that_do_not_fit_the_corpus(tmp_path: Path, change, message: str) -> None:

    manifest = Corpus(make_corpus(tmp_path / "corpus", words=50)).manifest
    path = tmp_path / "scores.json"
    write_token_scores(path, np.linspace(1, 2, 55), manifest.tokenizer_sha256, {})
    assert read_token_scores(path, manifest).tolist() == np.linspace(1, 2, 55).tolist()
    if change is None:
        path.unlink()
    else:
        found = json.loads(path.read_text(encoding="utf-8"))
        change(found)
        path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=r"masking\.frequency\.scores") as error:
        read_token_scores(path, manifest)
    assert message in str(error.value)


def test_scores_in_the_configuration(tmp_path: Path) -> None:
    """Powers do not apply; without scores, the identity is that of earlier versions; a moved file is the same."""
    with pytest.raises(ValueError, match="power does not apply with scores"):
        MaskingConfig.model_validate({"strategy": "frequency", "frequency": {"scores": "x.json", "power": 0.3}})
    assert "scores" not in MaskingConfig(strategy="frequency").identity()["frequency"]
