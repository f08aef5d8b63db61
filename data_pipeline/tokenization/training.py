"""Training of tokenizers: BERT's WordPiece, RoBERTa's byte-level BPE, or new words for one that there is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.execution.progress import ProgressBar
from data_pipeline.files import CorpusError, atomic_folder
from data_pipeline.filters.rules import DocumentFilter, DocumentRules
from data_pipeline.hub import TOKENIZER_FILES, local_folder
from data_pipeline.numbers import counted
from data_pipeline.sources.cuts import cut_units
from data_pipeline.sources.description import Description, find_files
from data_pipeline.sources.documents import batches, read_documents
from data_pipeline.sources.inputs import Piece, Source, find_sources, where_text_may_be
from data_pipeline.sources.reading import LIMITS, Limits, Reading
from data_pipeline.tokenization.bert_folder import BERT_ROLES, BertSettings, bert_tokenizer, save_bert
from data_pipeline.tokenization.extension import Extension, TokenizerExtension

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = ("wordpiece", "byte-bpe")
_ROBERTA_ROLES = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
# The most frequent characters get a vocabulary entry, as in BERT; words with other characters become [UNK].
_ALPHABET = 1000


def _letter_counts(counts: NDArray[np.int64], normalizer: Any) -> Counter[str]:
    """Occurrences of each character in the normalised text, from the code point counts of the raw text."""
    letters: Counter[str] = Counter()
    for point in np.flatnonzero(counts).tolist():
        for letter in normalizer.normalize_str(chr(point)):
            letters[letter] += int(counts[point])
    return letters


def _train(texts: Callable[[], Iterator[list[str]]], vocab_size: int, lower_case: bool) -> dict[str, int]:
    """Train WordPiece in two passes over the text; returns the vocabulary, a deterministic function of the text.

    The trainer numbers continuation characters ("##a") in hash-map order, which differs between runs, and breaks ties
    by these numbers. The first pass collects the characters; the second is given them in a fixed order.
    """
    from tokenizers.trainers import WordPieceTrainer

    special = list(BERT_ROLES.values())
    counts = np.zeros(0x110000, np.int64)

    def counted() -> Iterator[list[str]]:
        for batch in texts():
            points = np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32)
            counts[:] += np.bincount(points, minlength=len(counts))
            yield batch

    first = bert_tokenizer(None, BertSettings(lower_case))
    first.train_from_iterator(counted(), WordPieceTrainer(vocab_size=1, show_progress=False))
    found = first.get_vocab()
    letters = _letter_counts(counts, first.normalizer)
    ranked = sorted((token for token in found if len(token) == 1), key=lambda c: (-letters[c], c))[:_ALPHABET]
    continued = sorted(f"##{letter}" for letter in ranked if f"##{letter}" in found)
    second = bert_tokenizer(None, BertSettings(lower_case))
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *continued],
        initial_alphabet=ranked,
        limit_alphabet=len(ranked),
        show_progress=False,
    )
    second.train_from_iterator(texts(), trainer)
    return second.get_vocab()


def _train_byte_level(texts: Callable[[], Iterator[list[str]]], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE in one pass over the text; a deterministic function of the text.

    The special tokens come first, then the 256 bytes, then merges by frequency, equal ones by the ids of their parts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_ROBERTA_ROLES.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _save_roberta(tokenizer: Tokenizer, folder: Path) -> None:
    """Save in the format that transformers loads as a RobertaTokenizer."""
    from tokenizers.processors import RobertaProcessing

    ids = {token: i for i, token in enumerate(_ROBERTA_ROLES.values())}
    cls, sep = _ROBERTA_ROLES["cls"], _ROBERTA_ROLES["sep"]
    tokenizer.post_processor = RobertaProcessing(
        (sep, ids[sep]), (cls, ids[cls]), trim_offsets=True, add_prefix_space=False
    )
    roles = {f"{role}_token": token for role, token in _ROBERTA_ROLES.items()}
    roles |= {"bos_token": roles["cls_token"], "eos_token": roles["sep_token"]}
    config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False, **roles}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(
    inputs: Sequence[str | Path] | None,
    vocab_size: int,
    output: str | Path,
    *,
    description: Description | None = None,
    kind: str = "wordpiece",
    cased: bool = False,
    documents: str = "blank-line",
    text_field: str = "text",
    no_text: str = "error",
    bad_records: str = "error",
    limits: Limits = LIMITS,
    progress: bool | None = None,
) -> None:
    """Train a tokenizer with exactly `vocab_size` entries and save it to the folder `output`.

    kind: "wordpiece" (BERT's; [PAD] [UNK] [CLS] [SEP] [MASK] get the ids 0 to 4), lower-cased unless `cased`, or
    "byte-bpe" (RoBERTa's; <s> <pad> </s> <unk> <mask> get these ids), which always keeps case. `output` must be new or
    empty; it is written atomically. The text is streamed twice for wordpiece; memory holds the count of each distinct
    word. The same text gives the same bytes.
    description: instead of `inputs` and of the options of reading; its document rules apply, except for duplicates and
    contamination, and its weights do not.
    progress: None shows a bar on a terminal; no_text, bad_records, limits: as in sources/reading.py.
    Raises CorpusError if the text yields another number of entries, and like `read_documents`.
    """
    if kind not in KINDS:
        raise CorpusError(f"kind of tokenizer {kind!r}: must be {' or '.join(KINDS)}")
    if cased and kind != "wordpiece":
        raise CorpusError(f"--cased is for kind wordpiece; {kind} always keeps case. Omit it")
    least, what = len(BERT_ROLES), "the special tokens"
    if kind == "byte-bpe":
        least, what = least + 256, "the special tokens and all bytes"
    if not least < vocab_size <= 2**32:
        raise CorpusError(
            f"vocabulary size {vocab_size:,}: must be above {least} ({what}) "
            f"and at most {2**32:,} (token ids are at most 32 bits wide)"
        )
    output = _free(output)
    text = _Text(inputs, description, documents, text_field, no_text, bad_records, limits)
    sources = text.sources

    def texts() -> Iterator[list[str]]:
        return text.batches(bar)

    passes = 2 if kind == "wordpiece" else 1
    trained = None
    with ProgressBar(passes * sum(source.bytes for source in sources), "train tokenizer", progress) as bar:
        if kind == "wordpiece":
            vocabulary = _train(texts, vocab_size, lower_case=not cased)
        else:
            trained = _train_byte_level(texts, vocab_size)
            vocabulary = trained.get_vocab()
    found = len(vocabulary)
    if found == least:
        raise CorpusError(_no_text(sources))
    if found != vocab_size:
        rule = "the text has no more word pieces" if found < vocab_size else "the characters alone need more"
        raise CorpusError(
            f"vocabulary size {vocab_size:,} is not possible with this text, which gives {found:,}: {rule}. "
            f"Use --vocab-size {found} or other text"
        )
    with atomic_folder(output) as folder:
        if trained is None:
            settings = BertSettings(lower_case=not cased)
            save_bert(bert_tokenizer(vocabulary, settings), folder, settings)
        else:
            _save_roberta(trained, folder)


def extend_tokenizer(
    inputs: Sequence[str | Path] | None,
    base: str | Path,
    number: int,
    output: str | Path,
    *,
    description: Description | None = None,
    documents: str = "blank-line",
    text_field: str = "text",
    no_text: str = "error",
    bad_records: str = "error",
    limits: Limits = LIMITS,
    progress: bool | None = None,
) -> Extension:
    """Save the tokenizer `base`, a folder or a name on a hub, with `number` new tokens for words of the text that it
    splits (extension.py) to the folder `output`. Its own tokens keep their ids.

    Other arguments: as for `train_tokenizer`. Memory holds the count of each distinct word; the same text gives the
    same bytes. Raises CorpusError if `base` cannot be extended, if the text yields fewer tokens, and like
    `read_documents`.
    """
    if not 0 < number < 2**32:
        raise CorpusError(f"--add {number:,}: must be above 0 and below {2**32:,} (token ids are at most 32 bits wide)")
    output = _free(output)
    text = _Text(inputs, description, documents, text_field, no_text, bad_records, limits)
    base = local_folder(base, TOKENIZER_FILES, "--extend")
    size = sum(source.bytes for source in text.sources)
    with atomic_folder(output) as folder, ProgressBar(size, "extend tokenizer", progress) as bar:
        extension = TokenizerExtension(base, folder)
        for batch in text.batches(bar):
            extension.count(batch)
        if not extension.words:
            raise CorpusError(_no_text(text.sources))
        return extension.extend(number)


def _free(output: str | Path) -> Path:
    """The path. Raises CorpusError if something is there that must not be overwritten."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CorpusError(f"{output}: output folder is not empty. Choose another, or remove it first")
    return output


class _Text:
    """The text of a tokenizer: arguments as of `train_tokenizer`. `sources`: its files."""

    def __init__(
        self,
        inputs: Sequence[str | Path] | None,
        description: Description | None,
        documents: str,
        text_field: str,
        no_text: str,
        bad_records: str,
        limits: Limits,
    ) -> None:
        if description is None:
            self._rules = DocumentRules.model_validate({"no_text": no_text, "bad_records": bad_records})
            self._groups = [(find_sources(inputs or ()), documents, text_field)]
        else:
            self._rules, self._groups = _described(description)
        self._limits = limits
        self.sources = [source for files, _, _ in self._groups for source in files]

    def batches(self, bar: ProgressBar) -> Iterator[list[str]]:
        """All texts, in batches; may be called several times."""
        rules = self._rules
        for files, unit, field in self._groups:
            for i, source in enumerate(files):
                reading = Reading(rules.bad_bytes != "error", rules.no_text, rules.bad_records, self._limits)
                source.check_unchanged()
                piece = Piece(i, 0, _end(source, field))
                rule_filter = DocumentFilter(rules, False, None)
                for batch, ends in batches(read_documents(source, piece, unit, field, bar.update, reading), 1 << 20):
                    yield rule_filter(batch, ends).texts if rules != DocumentRules() else batch
                source.check_unchanged()


def _no_text(sources: list[Source]) -> str:
    names = ", ".join(source.path for source in sources[:3])
    files = counted(len(sources), "file")
    return f"{names}: the corpus is empty: no text in {files}. Add text{where_text_may_be(sources)}"


def _described(description: Description) -> tuple[DocumentRules, list[tuple[list[Source], str, str]]]:
    """The rules that apply to a tokenizer, and of each source its files, unit of a document and text field."""
    rules = description.documents.model_copy(update={"duplicates": "keep", "decontaminate": ()})
    found = zip(find_files(description), description.sources, strict=True)
    return rules, [(files, section.documents, section.text_field) for files, section in found]


def _end(source: Source, text_field: str) -> int:
    """Where the piece ends that is the entire source: bytes, row groups or record batches."""
    (unit,) = cut_units([source], "file", text_field, 1 << 62)
    return unit[-1].stop
