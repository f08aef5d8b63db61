"""Questions: files, windows and their targets, the best spans, thresholds, and a tiny model that learns to answer."""

import gzip
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from maskvr_ds.cli import main
from maskvr_ds.downstream import spans
from maskvr_ds.downstream.baselines import bag_of_words, main_score, majority, targets
from maskvr_ds.downstream.examples import Split, describe, hold_out
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.spans import Windows, best_spans, choose_threshold, final_answers
from maskvr_ds.downstream.tasks import SQUAD, TaskError
from tests.reference.squad import question_scores
from tests.support.corpora import make_tokenizer
from tests.support.tasks import results, save_model, write_squad
from tests.support.tokenizers import KINDS

V1, V2 = SQUAD["squad"], SQUAD["squad_v2"]


def published(path: Path, questions: list[tuple[str, str, list[tuple[str, int]]]]) -> Path:
    """A file of one question per paragraph."""
    paragraphs = [
        {
            "context": context,
            "qas": [{"question": question, "answers": [{"text": t, "answer_start": s} for t, s in answers]}],
        }
        for question, context, answers in questions
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["published", "squad_v2", "parquet", "jsonl"])
def test_forms_of_files(form: str, tmp_path: Path) -> None:
    """One folder for both versions, folders by name, and what `datasets` stores; all read alike."""
    expected = read_task(V2, write_squad(tmp_path / "expected", version=2))
    folder = tmp_path / "data"
    if form == "published":
        write_squad(folder / "squad", version=1)
        write_squad(folder / "squad", version=2)
        assert len(read_task(V1, folder).train.labels[2]) == 1
    elif form == "squad_v2":
        write_squad(folder / "squad_v2", version=2)
        for part in ("train", "dev"):
            for path in (folder / "squad_v2").glob(f"{part}-v2.0.*"):
                path.rename(path.with_name(path.name.replace("-v2.0", "")))
    else:
        folder.mkdir()
        for name, split in (("train", expected.train), ("validation", expected.dev["dev"])):
            rows = [
                {
                    "question": q,
                    "context": c,
                    "answers": {"text": [t for t, _ in answers], "answer_start": [s for _, s in answers]},
                }
                for (q, c), answers in zip(split.texts, split.labels, strict=True)
            ]
            if form == "parquet":
                pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}-0000.parquet")
            else:
                text = "".join(json.dumps(row) + "\n" for row in rows).encode()
                (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text))
    found = read_task(V2, folder)
    assert (found.train.digest, found.dev["dev"].digest) == (expected.train.digest, expected.dev["dev"].digest)
    assert sum(not answers for answers in found.train.labels) == 48


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"data": [{"title": "\\ud800"}]}', "is half of a surrogate pair"),
        ("[]", "expected a list of objects as 'data'"),
        ('{"data": [{"title": "x"}]}', "data 0: expected a list of objects as 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"context": "c"}]}]}', "paragraphs 0: expected a list of objects as 'qas'"),
        ('{"data": [{"paragraphs": [{"context": 1, "qas": [{"question": "q", "answers": []}]}]}]}', "expected text as"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}', "expected answers with a text"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "c"}]}]}]}]}',
            "data 0, paragraphs 0, qas 0: expected answers with a text and a number as answer_start",
        ),
        ('{"data": []}', "the training set is empty"),
    ],
)
def test_files_of_another_form(content: str, message: str, tmp_path: Path) -> None:
    write_squad(tmp_path)
    (tmp_path / "train-v1.1.json.gz").unlink()
    (tmp_path / "train-v1.1.json").write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        read_task(V1, tmp_path)


def test_versions_are_not_mixed(tmp_path: Path) -> None:
    one = write_squad(tmp_path / "one", version=1)
    (one / "train-v1.1.json.gz").rename(one / "train.json.gz")
    (one / "dev-v1.1.json").rename(one / "dev.json")
    with pytest.raises(TaskError, match=r"all 96 training questions have an answer.*; evaluate on squad$"):
        read_task(V2, one)
    two = write_squad(tmp_path / "two", version=2)
    (two / "train-v2.0.json.gz").rename(two / "train.json.gz")
    (two / "dev-v2.0.json").rename(two / "dev.json")
    with pytest.raises(TaskError, match=r"48 questions of the training set have no answer.*; evaluate on squad_v2$"):
        read_task(V1, two)


def test_folders_of_both_versions_side_by_side(tmp_path: Path) -> None:
    one, two = write_squad(tmp_path / "squad", version=1), write_squad(tmp_path / "squad_v2", version=2)
    expected = {V1: read_task(V1, one), V2: read_task(V2, two)}
    assert {task: read_task(task, tmp_path) for task in (V1, V2)} == expected
    # Of version 2.0 alone, in the folder of the name that both versions share.
    two.rename(tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.rename(one / path.name)
    (tmp_path / "squad_v2").mkdir()
    assert read_task(V2, tmp_path) == expected[V2]


def test_an_answer_that_is_not_in_its_context(tmp_path: Path) -> None:
    """It is counted, is no target of training, and still counts in scoring."""
    good = ("q", "w1 w2 w3", [("w2", 3)])
    bad = [("q", "w1 w2 w3", [("w2", 4)]), ("q", "w1", [("w9", 0)]), ("q", "w1", [("w1", -2)]), ("q", "", [("w1", 0)])]
    published(tmp_path / "train.json", [good, *bad, ("q", "w5 w6", [("w7", 0), ("w6", 3)])])
    published(tmp_path / "dev.json", [good, bad[0]])
    data = read_task(V1, tmp_path)
    assert describe(data)["misplaced_answers"] == 5
    encoder = _encoder(tmp_path / "m")
    windows = Windows(encoder, data.train, 24, 8, labelled=True)
    # The second answer of the last question is where it should be.
    assert len(windows) == 2
    assert main_score(V1, targets(V1, (), data.dev["dev"]), ["w2", "w2"]) == 1
    assert len(Windows(encoder, data.dev["dev"], 24, 8, labelled=False).answers(*np.zeros((2, 2, 24)))) == 2
    published(tmp_path / "train.json", bad)
    with pytest.raises(TaskError, match="no training question has an answer that is in its context"):
        read_task(V1, tmp_path)


def _encoder(folder: Path, kind: str = "bert") -> Encoder:
    if kind == "bert":
        make_tokenizer(folder, 40)
    else:
        folder.mkdir()
        make, options = KINDS[kind]
        make(folder, **options)
    return Encoder("m", folder, "", AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize(("length", "stride"), [(16, 4), (16, 0), (24, 8), (64, 20)])
def test_windows_and_targets(kind: str, length: int, stride: int, tmp_path: Path) -> None:
    """Every window is [CLS] question [SEP] context [SEP]; windows share `stride` tokens and cover the context; the
    targets are the answer's tokens in exactly the windows that contain it."""
    encoder = _encoder(tmp_path / "m", kind)
    words = [f"w{i % 40}" for i in range(50)]
    context = " ".join(words)
    starts = [len(" ".join(words[:i])) + bool(i) for i in range(50)]
    questions = [("w1 w2", context)] * 50
    answers = tuple(((" ".join(words[i : i + 2]), starts[i]),) for i in range(50))
    windows = Windows(encoder, Split(tuple(questions), answers), length, stride, labelled=True)
    unlabelled = Windows(encoder, Split(tuple(questions), answers), length, stride, labelled=False)
    assert [item["input_ids"] for item in windows.items] == [item["input_ids"] for item in unlabelled.items]
    seen: dict[int, int] = {}
    covered: dict[int, list[tuple[int, int]]] = {}
    for item, (i, mask, characters) in zip(windows.items, unlabelled.windows, strict=True):
        positions = np.flatnonzero(mask)
        tokens = [(int(a), int(b)) for a, b in characters[positions]]
        if i in covered:
            shared = min(stride, len(tokens))
            assert covered[i][len(covered[i]) - shared :] == tokens[:shared]
            covered[i] += tokens[shared:]
        else:
            covered[i] = tokens
        first, last = item["start_positions"], item["end_positions"]
        inside = tokens[0][0] <= starts[i] and starts[i] + len(answers[i][0][0]) <= tokens[-1][1]
        assert (first > 0) == inside
        if inside:
            assert context[characters[first][0] : characters[last][1]].strip() == answers[i][0][0]
            seen[i] = seen.get(i, 0) + 1
        assert len(item["input_ids"]) <= length
    whole = encoder.tokenizer(context, add_special_tokens=False)["input_ids"]
    assert {len(tokens) for tokens in covered.values()} == {len(whole)}
    # With enough shared tokens no answer is cut by all windows.
    if stride >= 8 or (kind == "bert" and stride >= 2):
        assert len(seen) == 50


def test_long_questions_are_shortened(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path / "m")
    for words, cut in ((8, 0), (9, 1)):
        split = Split((("w1 " * words, "w2 w3"),), ((("w2", 0),),))
        windows = Windows(encoder, split, 24, 8, labelled=True)
        assert windows.truncated == cut
        assert len(windows[0]["input_ids"]) == 8 + 2 + 3
    with pytest.raises(TaskError, match="--stride 13: windows of 24 tokens can share at most 11"):
        spans.check_stride(24, 13)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.data(),
)  # fmt: skip
def test_best_spans(starts: list[int], data: Any) -> None:
    """Against a search of all spans, with a shorter maximum."""
    ends = data.draw(st.lists(st.integers(-3, 3), min_size=len(starts), max_size=len(starts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "MAX_ANSWER", 3)
        found = list(best_spans(np.array(starts, np.float32), np.array(ends, np.float32)))
    pairs = itertools.combinations_with_replacement(range(len(starts)), 2)
    every = [(float(starts[i] + ends[j]), i, j) for i, j in pairs if j - i < 3]
    assert [score for score, _, _ in found] == sorted((s for s, _, _ in every), reverse=True)[: spans.N_BEST]
    assert set(found) <= set(every)
    assert len(set(found)) == len(found)


def test_answers_over_windows(tmp_path: Path) -> None:
    """The best span of all windows, once if two have it; "no answer" by the window that is least sure of it."""
    context = " ".join(f"w{i}" for i in range(10, 30))
    windows = Windows(_encoder(tmp_path / "m"), Split((("w1", context), ("w2", "")), ((), ())), 16, 4, labelled=False)
    assert [i for i, *_ in windows.windows] == [0, 0, 1]
    starts, ends = np.full((2, 3, 16), -9.0)
    starts[:, 0], ends[:, 0] = (1, 2, 5), (1, 3, 5)
    # Tokens 8 to 11 of the context are in both windows: at 3 + 8 in the first, at 3 in the second.
    starts[0, 11], ends[0, 12] = 2, 2
    starts[1, 3], ends[1, 4] = 3, 3
    starts[1, 10], ends[1, 10] = 1, 1
    # Of the question and the special tokens: no spans.
    starts[1, 1] = ends[1, 1] = 50
    first, second = windows.answers(starts, ends)
    # [1, 10] and the end at 4 are no span: they are in the wrong order.
    assert first["answers"][:2] == [["w18 w19", 6.0], ["w18 w19 w20 w21 w22 w23 w24 w25", 4.0]]
    assert first["null"] == 2
    assert second == {"answers": [], "null": 10}
    assert final_answers([first, second], None) == ["w18 w19", ""]
    assert final_answers([first, second], -4.0) == ["w18 w19", ""]
    assert final_answers([first, second], -4.1) == ["", ""]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(-3, 3)), min_size=1, max_size=8), st.integers(1, 2))
def test_the_threshold(questions: list[tuple[bool, bool, int]], runs: int) -> None:
    """No other one scores higher, on all runs together. questions: has an answer, is answered rightly, advantage."""
    golds = [["w1"] if has else [] for has, _, _ in questions]
    truth = [tuple(g) or ("",) for g in golds]
    run = [{"answers": [["w1" if right else "w2", 0.0]], "null": float(null)} for _, right, null in questions]
    threshold, value = choose_threshold(truth, [run] * runs)

    def mean(bound: float) -> float:
        given = final_answers(run, bound)
        return float(np.mean([np.mean(question_scores(g, a, 2)) for g, a in zip(golds, given, strict=True)]))

    assert mean(threshold) == pytest.approx(value)
    assert value == pytest.approx(max(mean(bound / 2) for bound in range(-9, 10)))


def test_questions_on_a_context_stay_together(tmp_path: Path) -> None:
    data = read_task(V1, write_squad(tmp_path, train=30))
    rest, held_out = hold_out(data.train, V1)
    assert not {c for _, c in rest.texts} & {c for _, c in held_out.texts}
    assert (len(rest), len(held_out)) == (108, 12)


def test_baselines(tmp_path: Path) -> None:
    train = [
        ("who wrote it", "Ann wrote it. Bob read a book.", [("Ann", 0)]),
        ("who read", "Cid slept. Ann did read.", [("Ann", 11)]),
        ("where", "Ann lives in Rome.", [("Rome", 13)]),
    ]
    dev = [("who slept today", "It rained. Cid slept. He was ill.", [("Cid", 11)]), ("zzz", "Ann.", [("Ann", 0)])]
    published(tmp_path / "train.json", train)
    published(tmp_path / "dev.json", dev)
    data = read_task(V1, tmp_path)
    assert majority(data) == {"dev": ["ann", "ann"]}
    assert bag_of_words(data) == ({"dev": ["Cid slept.", "Ann."]}, None)
    two = read_task(V2, write_squad(tmp_path / "two", version=2))
    # As many questions without an answer as all with one together.
    assert set(majority(two)["dev"]) == {""}
    _, minimum = bag_of_words(two)
    assert minimum is not None


QUICK = ["--learning-rates", "5e-3", "--epochs", "12", "--batch-size", "16", "--max-length", "24"]


def evaluate(model: Path, data: Path, output: Path, task: str, *more: str) -> dict[str, Any]:
    words = ["evaluate", str(model), "--tasks", task, "--data", str(data), "--output", str(output), *QUICK, *more]
    assert main(words) == 0
    return results(output, task)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_model_learns_to_answer(model: Path, tmp_path: Path) -> None:
    found = evaluate(model, write_squad(tmp_path / "d", train=60), tmp_path / "o", "squad", "--seeds", "1")
    scores = {name: row["scores"]["exact_match"]["mean"] for name, row in found["rows"].items()}
    assert scores[str(model)] > 0.9
    assert max(scores["majority"], scores["bag of words"]) < 0.2
    assert found["rows"][str(model)]["scores"]["squad_f1"]["mean"] >= scores[str(model)]
    assert found["rows"][str(model)]["threshold"] is None


def test_a_model_learns_to_give_no_answer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The threshold comes from runs on the training set alone, also with a single learning rate."""
    data = write_squad(tmp_path / "d", train=60, version=2)
    found = evaluate(model, data, tmp_path / "o", "squad_v2", "--seeds", "1")
    row = found["rows"][str(model)]
    assert row["scores"]["exact_match"]["mean"] > 0.9
    assert found["rows"]["majority"]["scores"]["exact_match"]["mean"] == 0.5
    assert [tried["learning_rate"] for tried in row["selection"]] == [5e-3]
    assert f'"no answer" is given if it scores more than {row["threshold"]:.2f}' in capsys.readouterr().out
    # Other labels of the evaluation set change neither choices nor predictions: nothing is run again.
    shutil.copytree(data, tmp_path / "d2")
    content = json.loads((data / "dev-v2.0.json").read_text(encoding="utf-8"))
    for paragraph in content["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            question["answers"] = []
    (tmp_path / "d2" / "dev-v2.0.json").write_text(json.dumps(content), encoding="utf-8")
    again = evaluate(model, tmp_path / "d2", tmp_path / "o", "squad_v2", "--seeds", "1")
    assert capsys.readouterr().out.count("(stored)") == 3
    other = again["rows"][str(model)]
    assert (other["threshold"], other["selection"]) == (row["threshold"], row["selection"])
    assert other["scores"]["exact_match"]["mean"] == pytest.approx(0.5, abs=0.1)


def test_refused_stride(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_squad(tmp_path / "d")
    words = ["evaluate", str(model), "--data", str(tmp_path / "d"), "--output", str(tmp_path / "o"), "--stride", "20"]
    assert main([*words, "--tasks", "sst2"]) == 1
    assert "--stride is an option of squad and squad_v2" in capsys.readouterr().err
    assert main([*words, "--tasks", "squad", *QUICK]) == 1
    assert "--stride 20: windows of 24 tokens can share at most 11" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
