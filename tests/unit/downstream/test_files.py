"""Task files: each form that GLUE and datasets ship, your own files, and what is refused."""

import csv
import gzip
import json
import re
from pathlib import Path

import datasets
import pytest

from maskvr_ds.downstream.examples import Split, TaskData, check, describe, hold_out, limited
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.tasks import GLUE, OWN, Task, TaskError, resolve
from tests.support.tasks import write_conll, write_sst2, write_tsv

# Task -> header and two rows of training and evaluation, as the files of GLUE have them; texts and labels expected.
FORMS: dict[str, tuple[list[list[str]], list[tuple[str, ...]], list[object]]] = {
    "cola": ([["gj04", "1", "", "A b."], ["gj04", "0", "*", 'A "b']], [("A b.",), ('A "b',)], ["1", "0"]),
    "sst2": (
        [["sentence", "label"], ["good\x85\u2028 ", "1"], ['a "b', "0"]],
        [("good\x85\u2028 ",), ('a "b',)],
        ["1", "0"],
    ),
    "mrpc": (
        [
            ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            ["1", "7", "8", "a", "b"],
            ["0", "7", "8", "c", "d"],
        ],
        [("a", "b"), ("c", "d")],
        ["1", "0"],
    ),
    "stsb": (
        [
            ["index", "genre", "sentence1", "sentence2", "score"],
            ["0", "x", "a", "b", "5.000"],
            ["1", "x", "c", "d", "0.5"],
        ],
        [("a", "b"), ("c", "d")],
        [5.0, 0.5],
    ),
    "qqp": (
        [
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            ["0", "1", "2", "a?", "b?", "1"],
            ["1", "3", "4", "a text that a line feed has cut"],
            ["1", "3", "4", "a text with", "a tab", "b?", "1"],
            ["2", "5", "6", "c?", "d?", "0"],
        ],
        [("a?", "b?"), ("c?", "d?")],
        ["1", "0"],
    ),
    "mnli": (
        [
            ["index", "genre", "sentence1_parse", "sentence1", "sentence2", "label1", "gold_label"],
            ["0", "x", "(a)", "a", "b", "neutral", "neutral"],
            ["1", "x", "(c)", "c", "d", "neutral", "contradiction"],
        ],
        [("a", "b"), ("c", "d")],
        ["neutral", "contradiction"],
    ),
    "qnli": (
        [
            ["index", "question", "sentence", "label"],
            ["0", "a?", "b", "entailment"],
            ["1", "c?", "d", "not_entailment"],
        ],
        [("a?", "b"), ("c?", "d")],
        ["entailment", "not_entailment"],
    ),
    "rte": (
        [
            ["index", "sentence1", "sentence2", "label"],
            ["0", "a", "b", "not_entailment"],
            ["1", "c", "d", "entailment"],
        ],
        [("a", "b"), ("c", "d")],
        ["not_entailment", "entailment"],
    ),
    "wnli": (
        [["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "1"], ["1", "c", "d", "0"]],
        [("a", "b"), ("c", "d")],
        ["1", "0"],
    ),
}


def test_all_tasks_of_glue_have_a_form() -> None:
    assert FORMS.keys() == GLUE.keys()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["tsv", "tsv.gz"])
@pytest.mark.parametrize("place", ["{folder}", "glue/{folder}", "{name}"])
def test_glue_files(tmp_path: Path, name: str, suffix: str, place: str) -> None:
    rows, texts, labels = FORMS[name]
    task = GLUE[name]
    home = tmp_path / place.format(folder=task.folder, name=name)
    for stem in ("train", *(stems[0] for _, stems in task.dev)):
        write_tsv(home / f"{stem}.{suffix}", rows)
    for folder in (tmp_path, home):
        data = read_task(task, folder)
        assert data.train == Split(tuple(texts), tuple(labels))
        assert list(data.dev) == [dev for dev, _ in task.dev]
        assert all(split == data.train for split in data.dev.values())
        assert data.skipped == (4 if name == "qqp" else 0)


def own(*texts: str, label: str | None = None) -> Task:
    (task,) = resolve(["classification"], texts, label)
    return task


def test_csv_and_json_lines(tmp_path: Path) -> None:
    rows = [("a, b", 'say "c"\nd', "x"), ("e", "\u2028f", "y")]
    with (tmp_path / "train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("title", "body", "topic"), *rows])
    lines = [json.dumps({"title": t, "body": b, "topic": c}, ensure_ascii=False) for t, b, c in rows]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = read_task(own("title", "body", label="topic"), tmp_path)
    assert data.train == data.dev["dev"] == Split((rows[0][:2], rows[1][:2]), ("x", "y"))
    assert data.labels == ("x", "y")


def test_conll(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP B-NP S-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\nB NNP I-NP E-PER\n"
    for name in ("eng.train", "eng.testa"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    data = read_task(OWN["conll"], tmp_path)
    assert data.train == Split((("EU", "rejects"), ("Peter", "B")), (("S-ORG", "O"), ("B-PER", "E-PER")))
    assert data.labels == ("B-PER", "E-PER", "O", "S-ORG")
    part = datasets.Dataset.from_dict(
        {"tokens": [["a", "b"]], "ner_tags": [[1, 0]]},
        features=datasets.Features(
            {
                "tokens": datasets.List(datasets.Value("string")),
                "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
            }
        ),
    )
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "disk")
    assert read_task(OWN["conll"], tmp_path / "disk").train == Split((("a", "b"),), (("B-X", "O"),))


GOOD = "sentence\tlabel\na\t0\nb\t1\n"


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ("text\tlabel\na\t0\n", GOOD, r"train.tsv: has no column 'sentence', which sst2 needs; it has 'text', 'label'"),
        ("sentence\tscore\na\t0\n", GOOD, "has no column 'label'"),
        (GOOD, "sentence\tlabel\na\t2\n", r"dev.tsv, line 2: unknown label '2'; sst2 has '0', '1'"),
        (GOOD, "sentence\tlabel\n", "sst2: the dev set is empty"),
        ("", GOOD, "train.tsv: is empty"),
        (GOOD, "sentence\tlabel\na\n", "dev.tsv, line 2: has 1 of 2 columns"),
        (GOOD, "sentence\tlabel\na\tb\t1\n", "line 2: has 3 of 2 columns; a text with a tab needs .csv or .jsonl"),
        (GOOD, "sentence\tlabel\tlabel\na\t1\t0\n", "dev.tsv: has several columns 'label'; rename all but one"),
        ("sentence\tlabel\na\t1\nb\t1\n", GOOD, "all training examples have the label '1'"),
        (GOOD, "sentence\tlabel\n\xff\t1\n", "dev.tsv: cannot be read .*expected UTF-8"),
    ],
)
def test_refused_files(tmp_path: Path, train: str, dev: str, message: str) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_bytes(train.encode("latin-1"))
    (tmp_path / "SST-2" / "dev.tsv").write_bytes(dev.encode("latin-1"))
    with pytest.raises(TaskError, match=message) as error:
        read_task(GLUE["sst2"], tmp_path)
    assert "\n" not in str(error.value)


def test_labels_only_in_dev(tmp_path: Path) -> None:
    for name, labels in (("train", "xy"), ("dev", "xz")):
        write_tsv(tmp_path / f"{name}.tsv", [("text", "label"), *(("t", label) for label in labels)])
    with pytest.raises(TaskError, match=r"the dev set has labels that the training set \(2 examples\) lacks: 'z'"):
        read_task(own(), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\nnot', "line 2: is not JSON"),
        ('{"text": "a \\uD83D b", "label": 1}', r"line 1: \\ud83d is half of a surrogate pair"),
        ('["a"]', "line 1: expected an object"),
        ('{"text": 1, "label": 1}', "line 1: expected text in 'text'"),
        ('{"text": "a", "label": null}', "line 1: the label None is neither a name nor an index"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}', "line 2: the label None"),
        ('{"text": "a", "label": 1.0}\n{"text": "b", "label": NaN}', "line 2: the label nan is neither"),
    ],
)
def test_refused_json_lines(tmp_path: Path, content: str, message: str) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        read_task(own(), tmp_path)


@pytest.mark.parametrize("value", ["nan", "high", "", "inf"])
def test_refused_numbers(tmp_path: Path, value: str) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", [("text", "score"), ("a", "1"), ("b", value)])
    with pytest.raises(TaskError, match=re.escape(f"line 3: the label {value!r} is not a finite number")):
        read_task(OWN["regression"], tmp_path)


@pytest.mark.parametrize("value", ["-1", "5.1"])
def test_scores_are_those_of_the_task(tmp_path: Path, value: str) -> None:
    """Of unlabelled test sets on the hub, every score is -1."""
    for name, score in (("train", "5.0"), ("dev", value)):
        header = ("sentence1", "sentence2", "score")
        write_tsv(tmp_path / "STS-B" / f"{name}.tsv", [header, ("a", "b", "0"), ("c", "d", score)])
    with pytest.raises(TaskError, match=rf"dev.tsv, line 3: the label '{value}' is not between 0 and 5"):
        read_task(GLUE["stsb"], tmp_path)


def test_long_texts_of_csv(tmp_path: Path) -> None:
    """Python's csv module has a limit of 131,072 characters."""
    limit = csv.field_size_limit()
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{'w ' * 100_000},x\nb,y\n", encoding="utf-8")
    assert len(read_task(own(), tmp_path).train.texts[0][0]) == 200_000
    assert csv.field_size_limit() == limit
    (tmp_path / "dev.csv").write_text("text,label\na, b,x\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"dev.csv, line 2: has 3 of 2 columns; a text with a comma needs quotes"):
        read_task(own(), tmp_path)


def test_incomplete_sets_of_files(tmp_path: Path) -> None:
    """A download that was interrupted must not be half of a training set."""
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    part.to_parquet(tmp_path / "dev-00000-of-00001-0a1b.parquet")
    for i in (0, 2, 1):
        part.to_parquet(tmp_path / f"train-0000{i}-of-00003.parquet")
        if i != 1:
            with pytest.raises(TaskError, match=r"expected one complete set of files, .* it has train-00000-of-00003"):
                read_task(own(), tmp_path)
    assert len(read_task(own(), tmp_path).train) == 6
    part.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(TaskError, match="expected one complete set"):
        read_task(own(), tmp_path)


def test_words_of_conll_may_contain_other_white_space(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.txt").write_text("10\u00a0000 NN\tB-X\r\n\u3000 O\n\nb O\n", encoding="utf-8")
    data = read_task(OWN["conll"], tmp_path)
    assert data.train == Split((("10\u00a0000", "\u3000"), ("b",)), (("B-X", "O"), ("O",)))


@pytest.mark.parametrize(
    ("task", "labels", "dev", "message"),
    [
        ("classification", ["x", "y", "z"] * 30, ["x", "y", "z"], "--max-train 5: .* has labels that the training set"),
        ("regression", [1.0, *[2.0] * 89], [1.0, 2.0], "--max-train 5: .* all numbers of the training set are 2.0"),
    ],
)
def test_too_few_training_examples(task: str, labels: list, dev: list, message: str) -> None:
    """--max-train may draw none of some classes: known before the first run, not when it is scored."""
    texts = tuple((f"w{i}",) for i in range(len(labels)))
    data = TaskData(OWN[task], Split(texts, tuple(labels)), {"dev": Split(texts[: len(dev)], tuple(dev))})
    check(data)
    with pytest.raises(TaskError, match=f"{message}.*; raise it"):
        limited(data, 5)
    with pytest.raises(TaskError, match="--intermediate-max-train 2: "):
        limited(data, 2, "--intermediate-max-train")


def test_a_constant_evaluation_set() -> None:
    """Its correlations are undefined."""
    texts = (("a",), ("b",))
    data = TaskData(OWN["regression"], Split(texts, (1.0, 2.0)), {"dev": Split(texts, (3.0, 3.0))})
    with pytest.raises(TaskError, match=r"all numbers of the dev set are 3\.0"):
        check(data)


def test_a_part_of_many_small_classes_is_held_out() -> None:
    """A tenth of each class of four is none; still a tenth of all is held out, and every class stays in training."""
    n = 400
    train = Split(tuple((f"text {i}",) for i in range(n)), tuple(f"c{i % 100}" for i in range(n)))
    rest, held_out = hold_out(train, own())
    assert (len(rest), len(held_out)) == (360, 40)
    assert len(set(held_out.labels)) == 40
    assert set(rest.labels) == set(train.labels)
    assert sorted([*rest.texts, *held_out.texts]) == sorted(train.texts)
    assert (rest, held_out) == hold_out(train, own())
    # One of each: a held-out example would be all of its class.
    single = Split(train.texts, tuple(f"c{i}" for i in range(n)))
    with pytest.raises(TaskError, match="nothing can be held out of 400 training examples"):
        hold_out(single, own())


@pytest.mark.parametrize(("line", "message"), [("a X", "unknown tag 'X'"), ("a", "expected a token and")])
def test_refused_tags(tmp_path: Path, line: str, message: str) -> None:
    write_conll(tmp_path)
    (tmp_path / "dev.txt").write_text(f"a O\n{line}\n", encoding="utf-8")
    with pytest.raises(TaskError, match=f"dev.txt, line 2: {message}"):
        read_task(OWN["conll"], tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no such folder"):
        read_task(GLUE["sst2"], tmp_path / "missing")
    write_sst2(tmp_path)
    with pytest.raises(TaskError, match=r"rte: .* has no folder RTE .*nothing is downloaded"):
        read_task(GLUE["rte"], tmp_path)
    # A folder of another task is not taken for it.
    with pytest.raises(TaskError, match="has no folder RTE"):
        read_task(GLUE["rte"], tmp_path / "SST-2")
    dev = tmp_path / "SST-2" / "dev.tsv"
    content = gzip.compress(dev.read_bytes())
    dev.unlink()
    with pytest.raises(TaskError, match="has no dev or validation or valid"):
        read_task(GLUE["sst2"], tmp_path)
    dev.with_suffix(".tsv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(TaskError, match=r"dev.tsv.gz: cannot be read"):
        read_task(GLUE["sst2"], tmp_path)


def test_columns_of_other_tasks_are_refused() -> None:
    with pytest.raises(TaskError, match="not of sst2"):
        resolve(["sst2"], ["a"], None)
    with pytest.raises(TaskError, match="expected one column, or two"):
        resolve(["classification"], ["a", "b", "c"])
    assert [task.name for task in resolve(["rte", "glue"])] == ["rte", *(name for name in GLUE if name != "rte")]


def test_the_held_out_part_is_of_the_training_set_alone(tmp_path: Path) -> None:
    data = read_task(GLUE["sst2"], write_sst2(tmp_path / "a", train=200))
    other = read_task(GLUE["sst2"], write_sst2(tmp_path / "b", train=200, flip_dev=True))
    assert data.dev != other.dev
    rest, held_out = hold_out(data.train, data.task)
    assert (rest, held_out) == hold_out(other.train, other.task)
    assert sorted([*rest.texts, *held_out.texts]) == sorted(data.train.texts)
    # The same share of each class: 120 and 80 of 200.
    assert (held_out.labels.count("1"), held_out.labels.count("0")) == (12, 8)
    assert len(limited(data, 50).train) == 50
    assert limited(data, 50) == limited(data, 50) != limited(other, 50)
    assert set(limited(data, 50).train.texts) <= set(data.train.texts)


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    """They stay examples; the report says how many there are, of pairs those with either text empty."""
    header = "sentence1\tsentence2\tlabel\n"
    rows = ["a\tb\tentailment", "\tb\tnot_entailment", "a\t \tentailment", " \t\tnot_entailment"]
    for name, n in (("train", 4), ("dev", 2)):
        folder = tmp_path / "RTE"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.tsv").write_text(header + "\n".join(rows[:n]) + "\n", encoding="utf-8")
    data = read_task(GLUE["rte"], tmp_path)
    assert (len(data.train), len(data.dev["dev"])) == (4, 2)
    assert describe(data)["empty_texts"] == 3 + 1
