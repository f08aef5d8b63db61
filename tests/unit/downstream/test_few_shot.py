"""Episodes, losses of prototypical networks by a second implementation, evaluations with few examples per class."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds.cli.main import main
from maskvr_ds.downstream import few_shot
from maskvr_ds.downstream.embeddings import Embedder, mean_over_tokens
from maskvr_ds.downstream.episodes import PARTS, Episode, Shape, make_pool
from maskvr_ds.downstream.episodic import centroid_accuracies, sparse_centroid_accuracies
from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.few_shot_report import mean_and_interval
from maskvr_ds.downstream.models import prepared
from maskvr_ds.downstream.prototypes import episode_loss
from maskvr_ds.downstream.tasks import Kind, TaskError
from tests.support.tasks import save_model


def labelled(sizes: list[int]) -> Split:
    """Class i has sizes[i] distinct texts."""
    rows = [(f"text {i} of {j}", f"c{j:02}") for j, size in enumerate(sizes) for i in range(size)]
    return Split(tuple((text,) for text, _ in rows), tuple(label for _, label in rows))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=6, max_size=30),
    ways=st.integers(2, 4),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_parts_and_episodes_are_disjoint(sizes: list[int], ways: int, shots: int, queries: int, seed: int) -> None:
    shape, split = Shape(ways, shots, queries), labelled(sizes)
    common = {f"c{j:02}" for j, size in enumerate(sizes) if size >= shape.examples}

    def pool():
        return make_pool(split, ways=ways, shots=shots, queries=queries, seed=seed, maximum=8, name="file")

    # Of one-shot episodes; of more, classes without enough texts are removed, and no other changes its part.
    divided = [j for j, size in enumerate(sizes) if size > queries]
    if len(divided) < 3 * ways:
        with pytest.raises(TaskError):
            pool()
        return
    one_shot = make_pool(split, ways=ways, shots=1, queries=queries, seed=seed, maximum=8, name="file").parts
    expected = {part: tuple(name for name in names if name in common) for part, names in one_shot.items()}
    if any(len(names) < ways for names in expected.values()):
        with pytest.raises(TaskError):
            pool()
        return
    made = pool()
    assert made.parts == expected
    names = [name for part in PARTS for name in made.parts[part]]
    assert sorted(names) == sorted(common)
    assert all(len(made.parts[part]) >= ways for part in PARTS)
    owner = {i: name for name, ids in made.examples.items() for i in ids.tolist()}
    for i, name in owner.items():
        assert made.texts[i].endswith(f"of {int(name[1:])}")
    for part in PARTS:
        for episode in made.episodes(part, shape, 3, seed):
            assert (episode.support.shape, episode.query.shape) == ((ways, shots), (ways, queries))
            drawn = np.concatenate([episode.support, episode.query], axis=1)
            assert len(set(drawn.ravel().tolist())) == drawn.size
            rows = [{owner[i] for i in row} for row in drawn.tolist()]
            assert all(len(row) == 1 for row in rows)
            chosen = {name for row in rows for name in row}
            assert len(chosen) == ways
            assert chosen <= set(made.parts[part])
    again = pool().episodes("test", shape, 3, seed)
    assert all(
        np.array_equal(a.support, b.support) for a, b in zip(made.episodes("test", shape, 3, seed), again, strict=True)
    )


def loss_by_hand(support: list, query: list, weight: float, margin: float, *, normalised: bool) -> float:
    """Loops over queries and classes, in Python's floats."""
    means = [[sum(z[d] for z in row) / len(row) for d in range(len(row[0]))] for row in support]

    def unit(z: list[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in z))
        return [x / length for x in z] if normalised else z

    def distance(z: list[float], c: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(z, c, strict=True))

    softmax, violations = [], []
    for y, row in enumerate(query):
        for z in row:
            distances = [distance(z, c) for c in means]
            softmax.append(distances[y] + math.log(sum(math.exp(-d) for d in distances)))
            scaled = [distance(unit(z), unit(c)) for c in means]
            violations += [max(0.0, margin + scaled[y] - d) for k, d in enumerate(scaled) if k != y]
    return sum(softmax) / len(softmax) + weight * sum(violations) / len(violations)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    weight=st.floats(0, 3),
    margin=st.floats(0, 3),
    normalised=st.booleans(),
    seed=st.integers(0, 999),
)
def test_loss_by_hand(
    shape: tuple[int, int, int, int], weight: float, margin: float, normalised: bool, seed: int
) -> None:
    ways, shots, queries, hidden = shape
    random = np.random.default_rng(seed)
    support, query = random.normal(size=(ways, shots, hidden)), random.normal(size=(ways, queries, hidden))
    found = episode_loss(
        torch.from_numpy(support), torch.from_numpy(query), weight=weight, margin=margin, normalised=normalised
    )
    expected = loss_by_hand(support.tolist(), query.tolist(), weight, margin, normalised=normalised)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_weight_0_is_the_plain_network() -> None:
    """Value and gradient; and where every query has the margin, the term adds nothing."""
    random = torch.Generator().manual_seed(0)
    support = torch.randn(3, 2, 8, generator=random, requires_grad=True)
    query = torch.randn(3, 4, 8, generator=random)
    plain = episode_loss(support, query)
    (expected,) = torch.autograd.grad(plain, support, retain_graph=True)
    without = episode_loss(support, query, weight=0, margin=5.0)
    assert torch.equal(without, plain)
    assert torch.equal(torch.autograd.grad(without, support)[0], expected)
    apart = 100 * torch.eye(3, 8).unsqueeze(1)
    far = apart.expand(3, 2, 8), apart.expand(3, 4, 8)
    for normalised in (True, False):
        assert torch.equal(episode_loss(*far, weight=2.0, margin=0.0, normalised=normalised), episode_loss(*far))
        assert episode_loss(*far, weight=2.0, margin=1e6, normalised=normalised) > episode_loss(*far) + 1e5


def test_accuracies_by_hand() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(30, 4)).round(1)
    episodes = [
        Episode(ids[:, :2], ids[:, 2:]) for ids in (random.permutation(30)[:15].reshape(3, 5) for _ in range(9))
    ]
    expected = []
    for episode in episodes:
        means = [features[row].mean(0) for row in episode.support]
        hits = [
            min(range(3), key=lambda k: ((features[i] - means[k]) ** 2).sum()) == y
            for y, row in enumerate(episode.query)
            for i in row
        ]
        expected.append(sum(hits) / len(hits))
    assert centroid_accuracies(torch.from_numpy(features), episodes).tolist() == pytest.approx(expected)
    from scipy import sparse

    assert sparse_centroid_accuracies(sparse.csr_matrix(features), episodes).tolist() == pytest.approx(expected)
    mean, half = mean_and_interval(np.array(expected))
    spread = math.sqrt(sum((x - mean) ** 2 for x in expected) / 8)
    assert half == pytest.approx(1.96 * spread / 3)


def test_embeddings(tmp_path: Path) -> None:
    """Padding and the order of the batch do not matter; they are means over the tokens of the text itself."""
    folder = save_model(tmp_path / "model", masked_lm=False)
    texts = ["w1 w2 w3 w4 w5", "w7", "w2 w2"] * 30
    with prepared([str(folder)], {Kind.CLASSIFICATION: 16}) as (encoder,):
        embedder = Embedder(encoder, 16)
        found = embedder.all(texts)
        model = embedder.model.eval()
        for i in (0, 1, 2, 88):
            ids = encoder.tokenizer(texts[i], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                alone = model(input_ids=ids).last_hidden_state[0].mean(0)
            assert torch.allclose(found[i], alone, atol=1e-5)
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_over_tokens(hidden, torch.tensor([[1, 1, 0]])).item() == 2


def test_embeddings_that_are_not_finite(tmp_path: Path) -> None:
    """The nearest of distances that are not numbers is always the first: an accuracy of chance, not an error."""
    folder = save_model(tmp_path / "model", masked_lm=False)
    with prepared([str(folder)], {Kind.CLASSIFICATION: 16}) as (encoder,):
        embedder = Embedder(encoder, 16)
        next(embedder.model.parameters()).data[5:] = torch.nan
        with pytest.raises(TaskError, match="model: its embeddings are not finite"):
            embedder.all(["w1 w2", "w7"])


WORDS = ("evaluate", "model", "--shots", "1", "2", "--data", "file.jsonl", "--output", "scores", "--quiet")
SMALL = (
    "--ways",
    "2",
    "--queries",
    "3",
    "--episodes",
    "20",
    "--seeds",
    "2",
    "--train-episodes",
    "6",
    "--max-length",
    "16",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has a model and a file of 8 classes, each with a word of its own."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", masked_lm=False)
    random = np.random.default_rng(0)
    with (tmp_path / "file.jsonl").open("w", encoding="utf-8") as file:
        for i in range(8 * 22):
            words = [f"w{i % 8}", *(f"w{j}" for j in random.integers(8, 40, 3))]
            file.write(json.dumps({"text": " ".join(words), "label": f"class {i % 8}"}) + "\n")
    return tmp_path


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_an_evaluation(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *SMALL]) == 0
    assert capsys.readouterr().out == (home / "scores" / "results.md").read_text(encoding="utf-8")
    found = results(home / "scores")
    rows = [few_shot.TFIDF, *(f"model: {method}" for method in few_shot.METHODS.values())]
    assert {shots: list(part["rows"]) for shots, part in found["shots"].items()} == {"1": rows, "2": rows}
    classes = found["data"]["classes"]
    assert sorted(name for names in classes.values() for name in names) == [f"class {i}" for i in range(8)]
    for part in found["shots"].values():
        assert len(part["differences"]) == 10
        assert [len(row["seeds"]) for row in part["rows"].values()] == [1, 1, 1, 2, 2]
        # Before the first episode, the encoder as it is.
        plain, margin = (part["rows"][name]["validation"][0] for name in rows[3:])
        assert plain[0] == margin[0]
        assert plain[-1]["episodes"] == 6


def test_killed_and_resumed_equals_undisturbed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, *SMALL, "--methods", "centroid", "prototypical", "margin"]
    assert main(words) == 0
    undisturbed = results(home / "scores")
    original: Callable = few_shot.train
    for kill_at in (0, 3):
        calls = []

        def killed(*given, calls=calls, kill_at=kill_at, **options):
            calls.append(given)
            if len(calls) == kill_at + 1:
                raise KeyboardInterrupt
            return original(*given, **options)

        monkeypatch.setattr(few_shot, "train", killed)
        again = [f"scores{kill_at}" if word == "scores" else word for word in words]
        assert main(again) == 130
        assert main(again) == 0
        # 8 trainings, and the killed one twice.
        assert len(calls) == 9
        found = results(home / f"scores{kill_at}")
        assert found["shots"] == undisturbed["shots"]


def test_labels_of_the_test_train_nothing(home: Path) -> None:
    """Other texts of the test classes change neither training nor validation."""
    words = [*WORDS, *SMALL, "--methods", "margin", "--seeds", "1"]
    assert main(words) == 0
    found = results(home / "scores")
    tested = set(found["data"]["classes"]["test"])
    lines = [json.loads(line) for line in Path("file.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["label"] in tested:
            line["text"] = " ".join(reversed(line["text"].split()[1:]))
    Path("file.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main([word if word != "scores" else "others" for word in words]) == 0
    name = f"model: {few_shot.METHODS['margin']}"
    for shots in ("1", "2"):
        before, after = (results(home / f)["shots"][shots]["rows"][name] for f in ("scores", "others"))
        assert before["validation"] == after["validation"]
        assert before["accuracy"] != after["accuracy"]


@pytest.mark.parametrize(
    ("options", "rows", "words"),
    [
        (["--ways", "3"], None, "file.jsonl: has 8 classes, and 3-way episodes need 9"),
        (["--shots", "9"], None, "file.jsonl: 0 of 8 classes have 24 distinct texts"),
        ([], [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "all 2 examples have the label 'x'"),
        ([], [{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], "1 texts are empty (the first: example 2)"),
        ([], [], "file.jsonl: has no examples"),
        (["--data", "nowhere.csv"], None, "--data nowhere.csv: no such file"),
        (["--margin-weight", "0"], None, "--margin-weight 0 is the method prototypical"),
        (["--methods", "probe", "--margin", "1"], None, "--margin is an option of the method margin"),
        (["--learning-rates", "1e-4"], None, "--learning-rates has no meaning with --shots"),
        (["--tasks", "sst2"], None, "--shots: episodes are of the task classification"),
        (["--text-columns", "a", "b"], None, "--text-columns a b: episodes have one text per example"),
        (["--max-length", "64"], None, "cannot read 64 tokens"),
    ],
)  # fmt: skip
def test_faults(
    home: Path, capsys: pytest.CaptureFixture[str], options: list[str], rows: list | None, words: str
) -> None:
    """One error that names value and rule, before anything is trained."""
    if rows is not None:
        (home / "file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main([*WORDS, "--ways", "2", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("error:") == 1
    assert not list((home / "scores").glob("runs/*/*"))


def test_options_of_episodes_need_shots(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word for word in WORDS if word != "model"]) == 1
    assert "nothing to evaluate: name a MODEL" in capsys.readouterr().err
    assert main(["evaluate", "model", "--data", "corpus", "--ways", "3"]) == 1
    assert "--ways is an option of episodes; give the number of examples with --shots" in capsys.readouterr().err
