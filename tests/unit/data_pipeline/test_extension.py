"""Extended tokenizers: old ids stay, new tokens are reached, and transformers encodes as the corpus is built."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_pipeline.__main__ import main
from data_pipeline.files import CorpusError
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from data_pipeline.tokenization.training import extend_tokenizer
from tests.support.tokenizers import DOMAIN, KINDS, TEXT, bert, save

SAMPLES = (*TEXT, DOMAIN, " kubernetes kubernetesx xkubernetes", "a [MASK] <mask> b")


def base_of(kind: str, folder: Path) -> Path:
    return bert(folder) if kind.startswith("bert") else save(kind, folder)


def vocabulary(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


@pytest.mark.parametrize("kind", ["bert", *KINDS])
def test_old_ids_stay_and_transformers_agrees(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    base = base_of(kind, tmp_path / "base")
    (tmp_path / "text.txt").write_text(DOMAIN * 5, encoding="utf-8")
    number = 3 if kind not in ("eurobert", "modernbert") and not kind.startswith("roberta") else 12
    made = extend_tokenizer([tmp_path / "text.txt"], base, number, tmp_path / "new")
    old, new = vocabulary(base), vocabulary(tmp_path / "new")
    assert {token: index for token, index in new.items() if token in old} == old
    first = max(old.values()) + 1
    assert sorted(new.keys() - old.keys(), key=new.__getitem__) == list(made.tokens)
    assert [new[token] for token in made.tokens] == list(range(first, first + number))
    assert made.after < made.before
    encoder, theirs = Encoder(tmp_path / "new"), AutoTokenizer.from_pretrained(tmp_path / "new")
    copy_tokenizer(tmp_path / "new", tmp_path / "checked")  # agrees with its class
    texts = [text for text in SAMPLES if "[MASK]" not in text]
    for text in texts:
        assert encoder.encode([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
    # Ids of texts without the new words do not change.
    before = Encoder(base)
    words = [word for text in TEXT for word in text.split() if word.isalpha() and word.isascii()]
    assert encoder.encode(words)[0].tolist() == before.encode(words)[0].tolist()
    assert encoder.special_tokens == before.special_tokens


@pytest.mark.parametrize("kind", ["bert", "mpnet", "xlm-roberta", "deberta-v2", "albert"])
def test_whole_words_that_save_most(tmp_path: Path, kind: str) -> None:
    """Against counts of the text: occurrences × (pieces - 1), and each chosen word is one token."""
    base = base_of(kind, tmp_path / "base")
    (tmp_path / "text.txt").write_text(DOMAIN * 5 + "fibrillation " * 40, encoding="utf-8")
    made = extend_tokenizer([tmp_path / "text.txt"], base, 2, tmp_path / "new")
    old, new = Encoder(base).tokenizer, Encoder(tmp_path / "new").tokenizer
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    words = Counter((old.normalizer.normalize_str(text) if old.normalizer else text).split())
    counted: Counter[str] = Counter()
    for word, count in words.items():
        counted[word.strip(".,()")] += count
    pieces = {word: len(old.encode(word, add_special_tokens=False).ids) for word in counted}
    best = sorted(counted, key=lambda word: -counted[word] * (pieces[word] - 1))[:2]
    assert [token.removeprefix("▁") for token in made.tokens] == best
    for word in best:
        assert len(new.encode(word, add_special_tokens=False).ids) == 1
    assert made.before - made.after == sum(counted[word] * (pieces[word] - 1) for word in best)


def test_bpe_continues_its_training(tmp_path: Path) -> None:
    """The new merges are those of a plain second implementation, which counts all pairs anew after each."""
    base = save("roberta", tmp_path / "base")
    for name in ("vocab.json", "merges.txt"):  # as in the first releases; they would contradict the new tokenizer.json
        (base / name).write_text("{}", encoding="utf-8")
    (tmp_path / "text.txt").write_text(DOMAIN * 3, encoding="utf-8")
    made = extend_tokenizer([tmp_path / "text.txt"], base, 15, tmp_path / "new")
    tokenizer = Encoder(base).tokenizer
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(DOMAIN * 3)]
    words = [word for word in words if word.removeprefix("Ġ").isalpha()]
    split = [[token.value for token in tokenizer.model.tokenize(word)] for word in words]
    expected = []
    for _ in range(15):
        counts = Counter(pair for pieces in split for pair in pairwise(pieces))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append("".join(pair))
        for pieces in split:
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i : i + 2] = ["".join(pair)]
                i += 1
    assert list(made.tokens) == expected
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    new = Encoder(tmp_path / "new").tokenizer
    assert [[token.value for token in new.model.tokenize(word)] for word in words] == split
    assert new.decode(new.encode(" a kubernetes b").ids) == " a kubernetes b"


def test_same_text_same_bytes_and_files_agree(tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    (tmp_path / "text.txt").write_text(DOMAIN * 5, encoding="utf-8")
    for name in ("a", "b"):
        extend_tokenizer([tmp_path / "text.txt"], base, 3, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    lines = (tmp_path / "a" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert {token: i for i, token in enumerate(lines)} == vocabulary(tmp_path / "a")
    twice = extend_tokenizer([tmp_path / "text.txt"], tmp_path / "a", 1, tmp_path / "c")
    assert not set(twice.tokens) & set(vocabulary(tmp_path / "a"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = bert(tmp_path / "base")
    (tmp_path / "text.txt").write_text(DOMAIN * 5, encoding="utf-8")
    words = ["tokenizer", "--extend", str(base), "--add", "3", "--input", str(tmp_path / "text.txt"), "--output"]
    assert main([*words, str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert f"tokenizer of {len(vocabulary(base)) + 3:,} entries, 3 of them new (kubernetes, myokarditis, " in said


def test_refusals(tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    (tmp_path / "text.txt").write_text(DOMAIN, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"--add 500: the text yields only \d+ new tokens .* Use --add"):
        extend_tokenizer([tmp_path / "text.txt"], base, 500, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "none.txt").write_text("a b c 12345\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="splits no word of the text"):
        extend_tokenizer([tmp_path / "none.txt"], base, 1, tmp_path / "new")
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "[UNK]"}
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"base.*has a WordLevel model; WordPiece, BPE and Unigram"):
        extend_tokenizer([tmp_path / "text.txt"], base, 1, tmp_path / "new")
