"""Small labelled files and models for the downstream tasks."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import BertConfig, BertForMaskedLM, BertModel

from tests.support.corpora import make_tokenizer

WORDS = 40


def write_tsv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Without quoting, as GLUE's files; compressed if the name ends with .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_sst2(folder: Path, *, train: int = 120, dev: int = 60, seed: int = 0, flip_dev: bool = False) -> Path:
    """A task as SST-2 is shipped, with the label given by which of two words a sentence contains; 60% have label 1."""
    random = np.random.default_rng(seed)
    for name, n in (("train", train), ("dev", dev)):
        rows = []
        for i in range(n):
            label = int(i % 5 < 3)
            words = [f"w{j}" for j in random.integers(2, WORDS, 6)]
            words[random.integers(6)] = f"w{label}"
            rows.append((" ".join(words), str(1 - label if flip_dev and name == "dev" else label)))
        write_tsv(folder / "SST-2" / f"{name}.tsv", [("sentence", "label"), *rows])
    return folder


def write_conll(folder: Path, *, train: int = 60, dev: int = 30, seed: int = 0) -> Path:
    """Entities of one or two tokens: w0, or w0 w1, is an X; w2 a Y."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for name, n in (("train", train), ("dev", dev)):
        lines = ["-DOCSTART- -X- O", ""]
        for _ in range(n):
            for j in random.integers(3, WORDS, 4):
                lines.append(f"w{j} NN O")
                if random.random() < 0.4:
                    lines += ["w0 NN B-X", "w1 NN I-X"] if random.random() < 0.5 else ["w2 NN B-Y"]
            lines.append("")
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def save_model(
    folder: Path, *, masked_lm: bool = True, tokenizer: bool = True, seed: int = 0, positions: int = 32,
    layers: int = 1,
) -> Path:  # fmt: skip
    """A tiny BERT of random weights, with a tokenizer of w0 … w39."""
    import torch

    torch.manual_seed(seed)
    vocabulary = make_tokenizer(folder, WORDS)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    (BertForMaskedLM if masked_lm else BertModel)(config).save_pretrained(folder)
    if not tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    return folder


def results(folder: Path, task: str) -> dict:
    """The task's part of results.json."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"][task]


def write_squad(folder: Path, *, train: int = 24, dev: int = 12, version: int = 1, seed: int = 0) -> Path:
    """Questions "w0" and "w1", answered by the word after w2 and after w3; each context has both, and 4 questions.

    version 2: every second question asks for "w4", which has no answer. Files as published, train compressed.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    name = {1: "v1.1", 2: "v2.0"}[version]
    for part, n in ((f"train-{name}.json.gz", train), (f"dev-{name}.json", dev)):
        paragraphs = []
        for i in range(n):
            words = [f"w{j}" for j in random.integers(5, WORDS, 8)]
            words[2], words[5] = "w2", "w3"
            context = " ".join(words)
            starts = [len(" ".join(words[:j])) + 1 for j in (3, 6)]
            questions = []
            for j in range(4):
                kind = j % 2
                answers = [{"text": words[3 + 3 * kind], "answer_start": starts[kind]}]
                if version == 2 and j >= 2:
                    questions.append({"id": f"{part}-{i}-{j}", "question": "w4", "answers": [], "is_impossible": True})
                else:
                    questions.append({"id": f"{part}-{i}-{j}", "question": f"w{kind}", "answers": answers})
            paragraphs.append({"context": context, "qas": questions})
        content = json.dumps({"version": name, "data": [{"title": part, "paragraphs": paragraphs}]}).encode()
        (folder / part).write_bytes(gzip.compress(content) if part.endswith(".gz") else content)
    return folder
