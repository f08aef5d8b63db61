"""Small synthetic corpora in the format of the data pipeline, with learnable structure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from data_pipeline.checksums import with_checksum, without_checksum
from data_pipeline.files import sha256_file
from data_pipeline.shards import Manifest, SpecialTokens, id_dtype, write_manifest, write_shard

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
# Ids as in RoBERTa's vocabularies: padding is 1.
PAD_IS_1 = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")


def make_tokenizer(folder: Path, words: int, special: tuple[str, ...] = SPECIAL) -> int:
    """Save a WordPiece tokenizer with the words w0 … w(words − 1); returns the vocabulary size. special: names of the
    special tokens, by id."""
    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{t[1:-1].lower()}_token": t for t in SPECIAL}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def make_corpus(
    folder: Path,
    *,
    rows: int = 256,
    length: int = 32,
    words: int = 200,
    shard_rows: int = 100,
    seed: int = 0,
    padded_last_row: bool = False,
    special: tuple[str, ...] = SPECIAL,
    unknown: bool = False,
    separated: bool = True,
    packed: bool = True,
) -> Path:
    """Write a corpus of arithmetic progressions over the words, so that the context determines a masked word.

    special: names of the special tokens, by id. unknown: all words are [UNK]; `words` may then be 0. separated: False
    for rows without [SEP], which the data pipeline never writes. packed: whether some rows contain the end of a
    document.
    """
    vocab_size = make_tokenizer(folder / "tokenizer", words, special)
    ids_of = {name[1:-1].lower(): index for index, name in enumerate(special)}
    random = np.random.default_rng(seed)
    start, step = random.integers(0, max(words, 1), (rows, 1)), random.integers(1, 4, (rows, 1))
    ids = ((start + step * np.arange(length)) % max(words, 1) + len(SPECIAL)).astype(id_dtype(vocab_size))
    if unknown:
        ids[:] = ids_of["unk"]
    ids[:, 0], ids[:, -1] = ids_of["cls"], ids_of["sep"]
    if packed:
        ids[random.random(rows) < 0.5, length // 2] = ids_of["sep"]
    if not separated:
        ids[ids == ids_of["sep"]] = len(SPECIAL)
    if padded_last_row:
        ids[-1, length // 2 :] = ids_of["pad"]
        ids[-1, length // 2 - 1] = ids_of["sep"]
    shards = [
        write_shard(
            folder, f"shard-{i:05d}.arrow", ids[s : s + shard_rows], np.ones(len(ids[s : s + shard_rows]), bool)
        )
        for i, s in enumerate(range(0, rows, shard_rows))
    ]
    write_manifest(
        folder,
        Manifest(
            schema_version=1,
            tokenizer_sha256=sha256_file(folder / "tokenizer" / "tokenizer.json"),
            vocab_size=vocab_size,
            special_tokens=SpecialTokens(**ids_of, all=tuple(range(5))),
            sequence_length=length,
            seed=0,
            packing="full_sequences",
            rows=rows,
            tokens=int((ids != ids_of["pad"]).sum()),
            documents=rows,
            sources=(),
            shards=tuple(shards),
        ),
    )
    return folder


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object], *, hashed: bool = True) -> None:
    """Change the JSON of a manifest, whose hash then agrees again. hashed: False removes it, as if an earlier version
    had written the manifest."""
    path = folder / "manifest.json"
    content = without_checksum(json.loads(path.read_bytes()), path, "")
    change(content)
    path.write_text(json.dumps(with_checksum(content) if hashed else content), encoding="utf-8")
