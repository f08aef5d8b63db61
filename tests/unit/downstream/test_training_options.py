"""Options of fine-tuning against invariants, plain PyTorch, and models of every tested architecture."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from maskvr_ds.downstream import fine_tuning, layers
from maskvr_ds.downstream.baselines import main_score, targets
from maskvr_ds.downstream.encoding import Encoded, TextWindows, window_means
from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.fine_tuning import Outcome, Settings, fine_tune
from maskvr_ds.downstream.losses import IGNORED, StepLoss, balanced_weights
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.spans import final_answers
from maskvr_ds.downstream.tasks import GLUE, OWN, SQUAD, Kind, Task
from tests.support.architectures import INSTALLED, SMALL
from tests.support.tasks import save_model

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    model = save_model(tmp_path_factory.mktemp("models") / "tiny", layers=2)
    with prepared([str(model)], {Kind.CLASSIFICATION: 16}) as (found,):
        yield found


def sentences(n: int, *, shortest: int = 3, share: float = 0.5) -> Split:
    """Texts of `shortest` to 10 words; `share` of them have label 1, a third of all labels are noise."""
    random = np.random.default_rng(0)
    texts, labels = [], []
    for i in range(n):
        label = int(i % 10 < 10 * share)
        words = [f"w{j}" for j in random.integers(2, 40, random.integers(shortest, 11))]
        words[0] = f"w{label if i % 3 else 1 - label}"
        texts.append((" ".join(words),))
        labels.append(str(label))
    return Split(tuple(texts), tuple(labels))


def of_kind(kind: Kind) -> tuple[Task, tuple[str, ...], Split]:
    """22 examples: of batches of 8 the last one has 6."""
    texts = sentences(22)
    if kind is Kind.REGRESSION:
        return OWN["regression"], (), Split(texts.texts, tuple(float(i % 4) for i in range(22)))
    if kind is Kind.TOKENS:
        words = tuple(tuple(text.split()) for (text,) in texts.texts)
        tags = tuple(tuple("B-X" if int(word[1:]) % 3 else "O" for word in sentence) for sentence in words)
        return OWN["conll"], ("B-X", "O"), Split(words, tags)
    if kind is Kind.SPAN:
        # Of one length: the softmax includes padding, which depends on the micro-batch.
        pairs = tuple((f"w{i % 5}", text) for i, (text,) in enumerate(sentences(22, shortest=10).texts))
        return SQUAD["squad"], (), Split(pairs, tuple(((text[:2], 0),) for _, text in pairs))
    return GLUE["sst2"], ("0", "1"), texts


def tuned(
    encoder: Encoder,
    kind: Kind,
    settings: Settings,
    folder: Path,
    *,
    train: Split | None = None,
    rate: float = 1e-3,
) -> tuple[Weights, Outcome]:
    """Fine-tune; → the saved weights."""
    task, labels, split = of_kind(kind)
    split = train or split
    held_out = split if settings.patience else None
    outcome = fine_tune(
        encoder, task, labels, split, {"dev": split}, settings,
        learning_rate=rate, seed=3, keep=folder, held_out=held_out,
    )  # fmt: skip
    return load_file(folder / "model.safetensors"), outcome


def settings(kind: Kind = Kind.CLASSIFICATION, **given: object) -> Settings:
    values = {"epochs": 2, "batch_size": 8, "max_length": 16, "precision": "fp32"}
    return Settings(**{**values, "stride": 5 if kind is Kind.SPAN else None, **given})  # type: ignore[arg-type]


def assert_close(found: Weights, expected: Weights, tolerance: float = 1e-5) -> None:
    """Except for what has no gradient, whose rounding Adam amplifies: the biases of keys and, of questions, those that
    shift all positions equally."""
    assert set(found) == set(expected)
    shifts = ("qa_outputs.bias", "layer.1.output.LayerNorm.bias") if "qa_outputs.bias" in found else ()
    for name in found:
        if not name.endswith(("key.bias", *shifts)):
            assert torch.allclose(found[name], expected[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("kind", list(Kind))
def test_accumulation_is_the_undivided_batch(encoder: Encoder, kind: Kind, tmp_path: Path) -> None:
    """Micro-batches of 4, the last one of 2, and with different numbers of tokens."""
    whole, one = tuned(encoder, kind, settings(kind), tmp_path / "whole")
    parts, two = tuned(encoder, kind, settings(kind, accumulation=2), tmp_path / "parts")
    assert one.steps == two.steps == 6
    assert_close(parts, whole)


def test_layer_decay_of_1_is_none(encoder: Encoder, tmp_path: Path) -> None:
    plain, _ = tuned(encoder, Kind.CLASSIFICATION, settings(), tmp_path / "plain")
    decayed, _ = tuned(encoder, Kind.CLASSIFICATION, settings(layer_decay=1.0), tmp_path / "decayed")
    assert all(torch.equal(plain[name], decayed[name]) for name in plain)
    other, _ = tuned(encoder, Kind.CLASSIFICATION, settings(layer_decay=0.5), tmp_path / "other")
    assert not torch.equal(
        plain["bert.encoder.layer.0.output.dense.weight"], other["bert.encoder.layer.0.output.dense.weight"]
    )


def test_learning_rates_by_depth(encoder: Encoder) -> None:
    """Two layers: 1, 0.5, 0.25 and 0.125 times the rate of the head, and weight decay as it was."""
    model = encoder.load(Kind.CLASSIFICATION, ("0", "1"))
    named = dict(model.named_parameters())
    biases = [p for name, p in named.items() if name.endswith("bias")]
    others = [p for name, p in named.items() if not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": 0.01, "lr": 8.0}, {"params": biases, "weight_decay": 0.0, "lr": 8.0}]
    found = {}
    for group in layers.decayed(groups, model, 0.5):
        for parameter in group["params"]:
            found[id(parameter)] = group["lr"], group["weight_decay"]
    assert len(found) == len(named)
    expected = {"bert.embeddings.": 1.0, "bert.encoder.layer.0.": 2.0, "bert.encoder.layer.1.": 4.0}
    for name, parameter in named.items():
        rate = next((rate for prefix, rate in expected.items() if name.startswith(prefix)), 8.0)
        assert found[id(parameter)] == (rate, 0.0 if name.endswith("bias") else 0.01), name


@pytest.mark.parametrize("architecture", INSTALLED)
def test_depths(architecture: str) -> None:
    config = AutoConfig.for_model(architecture, vocab_size=100, pad_token_id=0, **SMALL[architecture])
    model = AutoModelForSequenceClassification.from_config(config)
    if architecture == "albert":
        with pytest.raises(ValueError, match="albert: its 3 layers share their weights"):
            layers.depths(model)
        return
    found, count = layers.depths(model)
    assert count == 3
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert set(found.values()) == {0, 1, 2, 3, 4}
    for name, depth in found.items():
        layer = re.search(r"\.(?:layer|layers)\.(\d+)\.", name)
        if layer:
            assert depth == int(layer[1]) + 1, name
        elif "embed" in name or "relative_attention_bias" in name:
            assert depth == 0, name
        else:
            assert depth == 4, name


@pytest.mark.parametrize(
    ("frozen", "fixed"), [(0, ("embeddings",)), (1, ("embeddings", "layer.0.")), (2, ("embeddings", "layer."))]
)
def test_frozen_weights_do_not_change(encoder: Encoder, frozen: int, fixed: tuple[str, ...], tmp_path: Path) -> None:
    before = encoder.load(Kind.CLASSIFICATION, ("0", "1")).state_dict()
    after, _ = tuned(encoder, Kind.CLASSIFICATION, settings(freeze=frozen, epochs=3), tmp_path / "m")
    for name, weight in after.items():
        if name.startswith("bert.pooler"):
            continue  # new, as the head
        equal = torch.equal(weight, before[name])
        assert equal == any(part in name for part in fixed), name


def test_class_weights_equal_a_weighted_loss(encoder: Encoder, tmp_path: Path) -> None:
    """Plain PyTorch with CrossEntropyLoss(weight=n / (2 n_c)), a fifth of the labels 1; also in two parts."""
    train = sentences(48, share=0.2)
    labels = torch.tensor([int(label) for label in train.labels])
    weights = torch.tensor([48 / (2 * int((labels == c).sum())) for c in (0, 1)])
    assert torch.equal(balanced_weights(labels.tolist(), 2), weights)
    chosen = settings(epochs=1, batch_size=16, class_weights="balanced")
    found, _ = tuned(encoder, Kind.CLASSIFICATION, chosen, tmp_path / "found", train=train)
    parts, _ = tuned(
        encoder, Kind.CLASSIFICATION, settings(epochs=1, batch_size=16, class_weights="balanced", accumulation=4),
        tmp_path / "parts", train=train,
    )  # fmt: skip
    assert_close(parts, found)
    unweighted, _ = tuned(encoder, Kind.CLASSIFICATION, settings(epochs=1, batch_size=16), tmp_path / "u", train=train)
    assert not torch.allclose(unweighted["classifier.weight"], found["classifier.weight"], atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    torch.manual_seed(3)
    plain = AutoModelForSequenceClassification.from_pretrained(encoder.folder, num_labels=2).train()
    decayed = [p for n, p in plain.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n]
    others = [p for n, p in plain.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    loss_of = torch.nn.CrossEntropyLoss(weight=weights)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step if step < 1 else (3 - step) / 2)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist()
    for start in range(0, 48, 16):
        drawn = order[start : start + 16]
        inputs = tokenizer([train.texts[i][0] for i in drawn], padding=True, return_tensors="pt")
        loss_of(plain(**inputs).logits, labels[drawn]).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_close(found, plain.state_dict())


def test_balanced_weights_of_tokens() -> None:
    """Tokens without a tag do not count; a class that does not occur has no weight."""
    weights = balanced_weights([[IGNORED, 0, 0, IGNORED], [2, 0]], 4)
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 0, 4 / (2 * 1), 0])
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[IGNORED, 0, 2], [0, IGNORED, 2]])
    loss = StepLoss(Kind.TOKENS, weights)
    batch = {"labels": labels}
    output = type("Output", (), {"logits": logits})
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weights)
    assert loss(output, batch, loss.items([batch])).item() == pytest.approx(expected.item(), rel=1e-6)


def test_windows_of_texts_that_fit(encoder: Encoder) -> None:
    """As without windows: the same inputs and predictions, bit for bit."""
    split, plain, long = sentences(22), settings(), settings(stride=5)
    inputs = [
        make(encoder, GLUE["sst2"], ("0", "1"), split, 16, *more, labelled=True)  # type: ignore[operator]
        for make, more in ((Encoded, ()), (TextWindows, (5,)))
    ]
    assert inputs[0].items == inputs[1].items
    found = [
        fine_tune(encoder, OWN["regression"], (), Split(split.texts, tuple(map(float, split.labels))),
                  {"dev": split}, how, learning_rate=1e-3, seed=0).predictions["dev"]
        for how in (plain, long)
    ]  # fmt: skip
    assert found[0] == found[1]


def test_windows_of_long_texts(encoder: Encoder) -> None:
    """Every word is read; windows share 5 tokens; the prediction is the mean over windows."""
    split = Split((("w1 " * 4,), (" ".join(f"w{i}" for i in range(30)),), ("w2",)), (0.0, 1.0, 2.0))
    windows = TextWindows(encoder, OWN["regression"], (), split, 16, 5, labelled=True)
    assert windows.owners == [0, 1, 1, 1, 2]
    assert windows.truncated == 0
    assert [item["labels"] for item in windows.items] == [0.0, 1.0, 1.0, 1.0, 2.0]
    rows = [encoder.tokenizer.convert_ids_to_tokens(item["input_ids"])[1:-1] for item in windows.items[1:4]]
    assert rows == [[f"w{i}" for i in range(start, min(start + 14, 30))] for start in (0, 9, 18)]

    outcome = fine_tune(
        encoder, OWN["regression"], (), split, {"dev": split}, settings(stride=5, epochs=20),
        learning_rate=1e-2, seed=0,
    )  # fmt: skip
    assert outcome.truncated == {"train": 0, "dev": 0}
    assert outcome.steps == 20  # 5 windows in one batch
    assert outcome.predictions["dev"] != fine_tune(
        encoder, OWN["regression"], (), split, {"dev": split}, settings(epochs=20), learning_rate=1e-2, seed=0,
    ).predictions["dev"]  # fmt: skip
    assert window_means(np.array([[1, 2], [3, 6], [5, 4], [7, 7]], np.float32), [0, 1, 1, 2]).tolist() == [
        [1, 2], [4, 5], [7, 7],
    ]  # fmt: skip


def test_predictions_are_means_over_windows(encoder: Encoder, tmp_path: Path) -> None:
    """Against a forward pass of the saved model over each window."""
    split = Split((("w1 w2",), (" ".join(f"w{i}" for i in range(30)),)), (0.0, 1.0))
    task = OWN["regression"]
    outcome = fine_tune(
        encoder, task, (), split, {"dev": split}, settings(stride=5), learning_rate=1e-3, seed=0, keep=tmp_path / "m"
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        found = [
            model(input_ids=torch.tensor([item["input_ids"]])).logits.item()
            for item in TextWindows(encoder, task, (), split, 16, 5, labelled=False).items
        ]
    assert outcome.predictions["dev"] == pytest.approx([found[0], np.mean(found[1:])], abs=1e-6)


def test_windows_of_pairs(encoder: Encoder) -> None:
    """The longer text is read in windows, the shorter one is in each, cut to a third."""
    long = " ".join(f"w{i}" for i in range(3, 30))
    split = Split(((long, "w1"), ("w2", long), (long, "w1 " * 9)), (None,) * 3)
    windows = TextWindows(encoder, GLUE["rte"], (), split, 18, 4, labelled=False)
    assert windows.owners is not None
    read: dict[int, list[list[str]]] = {0: [], 1: [], 2: []}
    for i, item in zip(windows.owners, windows.items, strict=True):
        assert len(item["input_ids"]) <= 18
        tokens = encoder.tokenizer.convert_ids_to_tokens(item["input_ids"])
        middle = tokens.index("[SEP]")
        read[i].append([" ".join(tokens[1:middle]), " ".join(tokens[middle + 1 : -1])])
    assert {second for _, second in read[0]} == {"w1"}
    assert {first for first, _ in read[1]} == {"w2"}
    assert {second for _, second in read[2]} == {" ".join(["w1"] * 6)}
    for i, side in ((0, 0), (1, 1), (2, 0)):
        assert {word for row in read[i] for word in row[side].split()} == set(long.split())
    assert windows.truncated == 1


def test_batches_of_similar_length(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch reads each example once, with less padding; runs with the option have an identity of their own."""
    split, seen = sentences(64), []
    step = fine_tuning._Trainer.training_step

    def recorded(trainer: object, model: object, inputs: Weights, *others: object) -> torch.Tensor:
        seen.append(inputs["input_ids"])
        return step(trainer, model, inputs, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(fine_tuning._Trainer, "training_step", recorded)
    positions = []
    for grouped in (None, True):
        how = settings(group_by_length=grouped)
        tuned(encoder, Kind.CLASSIFICATION, how, tmp_path / str(grouped), train=split)
        pad = encoder.tokenizer.pad_token_id
        rows = sorted(tuple(row[row != pad].tolist()) for batch in seen for row in batch)
        expected = [tuple(encoder.tokenizer(text)["input_ids"]) for (text,) in split.texts]
        assert rows == sorted(2 * expected)
        positions.append(sum(batch.numel() for batch in seen))
        seen.clear()
    assert positions[1] < 0.95 * positions[0]
    assert settings().identity() != settings(group_by_length=True).identity()


def test_predictions_of_batches_of_similar_length(encoder: Encoder, tmp_path: Path) -> None:
    """In the order of the examples: those of the saved model, one example after the other. Early stopping reads them
    while it trains."""
    task, labels, split = of_kind(Kind.REGRESSION)
    how = settings(Kind.REGRESSION, group_by_length=True, patience=1, epochs=4)
    _, outcome = tuned(encoder, Kind.REGRESSION, how, tmp_path / "m", rate=5e-3)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        inputs = [encoder.tokenizer(text, return_tensors="pt") for (text,) in split.texts]
        expected = [model(**each).logits.item() for each in inputs]
    assert np.std(expected) > 1e-5
    assert outcome.predictions["dev"] == pytest.approx(expected, rel=0, abs=1e-6)
    assert outcome.stopping is not None
    score = dict(map(tuple, outcome.stopping["held_out_scores"]))[outcome.stopping["epoch"]]
    assert score == pytest.approx(main_score(task, targets(task, labels, split), outcome.predictions["dev"]))


def test_early_stopping_takes_the_best_epoch(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the epochs are given: the second one is the best; two without a better one end the training."""
    script, states = [0.2, 0.5, 0.5, 0.3, 0.9, 0.9], []

    def score(_: object, trainer: object) -> float:
        states.append({name: weight.clone() for name, weight in trainer.model.state_dict().items()})  # type: ignore[attr-defined]
        return script[len(states) - 1]

    monkeypatch.setattr(fine_tuning._HeldOut, "__call__", score)
    found, outcome = tuned(encoder, Kind.CLASSIFICATION, settings(patience=2, epochs=6), tmp_path / "m")
    assert outcome.stopping == {"epoch": 2.0, "held_out_scores": [[float(i + 1), s] for i, s in enumerate(script[:4])]}
    assert outcome.steps == 4 * 3
    assert all(torch.equal(found[name], states[1][name]) for name in found)
    assert not torch.equal(found["classifier.weight"], states[3]["classifier.weight"])


def test_early_stopping_scores_the_held_out_part(encoder: Encoder, tmp_path: Path) -> None:
    """The recorded score of the kept epoch is that of the model's predictions; for every kind of task."""
    for kind in Kind:
        how = settings(kind, patience=1, epochs=4)
        task, labels, split = of_kind(kind)
        _, outcome = tuned(encoder, kind, how, tmp_path / kind.value, rate=5e-3)
        stopping = outcome.stopping
        assert stopping is not None
        truth = targets(task, labels, split)
        predictions = outcome.predictions["dev"]
        if kind is Kind.SPAN:
            predictions = final_answers(predictions, None)
        score = dict(map(tuple, stopping["held_out_scores"]))[stopping["epoch"]]
        assert score == pytest.approx(main_score(task, truth, predictions))
        assert score == max(score for _, score in stopping["held_out_scores"])
