"""Arguments of the commands: rules, the description they make, and what is recorded of them in build.json."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import CorpusError
from data_pipeline.filters.rules import NEWER_RULES, DocumentRules
from data_pipeline.manifest import PACKINGS
from data_pipeline.numbers import MAX_LENGTH, MAX_WORKERS
from data_pipeline.packing.parts import PackOptions
from data_pipeline.sources.description import Description, SourceSection, read_description
from data_pipeline.sources.documents import DOCUMENTS
from data_pipeline.sources.reading import RULES, Limits
from data_pipeline.tokenization.token_shards import PLANES

MIN_SEQUENCE_LENGTH = 8
PAIR_PROBABILITY = 0.5
SPLITS = ("document", "file")
_MAX_MB = 1e12  # in bits, this is below 2^63


@dataclass(frozen=True)
class Safeguards:
    """What a build accepts; none of it changes a corpus that is accepted.

    max_record: characters of one record (a line of JSON, a row of a table), in millions; max_expansion: bytes of text
    per byte of a file, above 1 GB of text; max_unknown: share of [UNK] among the tokens of a source.
    """

    max_record: float = 256.0
    max_expansion: float = 1000.0
    max_unknown: float = 0.5

    def limits(self) -> Limits:
        """The limits of the readers. Raises CorpusError for a value out of range, naming the argument and the rule."""
        check_rules(
            (
                (0 < self.max_record <= 2000, "max record", self.max_record, "above 0 and at most 2000"),
                (1 <= self.max_expansion <= 1e9, "max expansion", self.max_expansion, "from 1 to 1e+09"),
                (0 < self.max_unknown <= 1, "max unknown", self.max_unknown, "above 0 and at most 1"),
            )
        )
        return Limits(int(self.max_record * 1e6), self.max_expansion)


SAFEGUARDS = Safeguards()


def resolve_description(
    inputs: Sequence[str | Path] | None,
    description: str | Path | None,
    documents: str,
    text_field: str,
    no_text: str = "error",
    bad_records: str = "error",
) -> tuple[Description, bool]:
    """The description, read from its file or made from `inputs`, and whether its sources have names (the former).

    documents, text_field: of `inputs`; those of a description are in its sources. no_text, bad_records: rules for the
    records of `inputs`; those of a description are in its section `documents`.
    Raises CorpusError unless exactly one of the two is given, if the file is invalid, for unknown rules, and for
    settings of `inputs` with a description.
    """
    rules = {"no_text": no_text, "bad_records": bad_records}
    for name, value, default in (("documents", documents, "blank-line"), ("text_field", text_field, "text")):
        if description is not None and value != default:
            raise CorpusError(f"{name} {value!r}: is not for a description. Set {name} of its sources")
    for name, rule in rules.items():
        check_rules(((rule in RULES, name, rule, f"one of {', '.join(RULES)}"),))
        if description is not None and rule != "error":
            raise CorpusError(f"{name} {rule!r}: is not for a description. Set {name} in its section documents")
    if (inputs is None) == (description is None):
        raise CorpusError("give either inputs or a description")
    if description is not None:
        return read_description(description), True
    section = SourceSection.model_construct(
        name="input",
        inputs=tuple(map(str, inputs or ())),
        format="auto",
        documents=documents,
        text_field=text_field,
        split=None,
        weight=1.0,
    )
    return Description.model_construct(
        sources=(section,), documents=DocumentRules.model_validate(rules), sentences=None, word_starts=False
    ), False


def with_required_planes(about: Description, columns: Collection[str], packing: str) -> Description:
    """The description, with word and sentence starts enabled if columns or packing need them."""
    required: dict[str, Any] = {"word_starts": True} if "word_start" in columns else {}
    if about.sentences is None and ("sentence_start" in columns or packing in ("nsp", "sop")):
        required["sentences"] = "punctuation"
    return about.model_copy(update=required)


def recorded_options(options: PackOptions, about: Description | None, named: bool) -> dict[str, Any]:
    """Packing options and description, as recorded in build.json."""
    record: dict[str, Any] = {"packing": options.packing, "columns": list(options.columns)}
    record["bins"] = list(options.bins[:-1])
    if options.packing in ("nsp", "sop"):
        record["pair_probability"] = options.probability
    if about is not None and named:
        record["description"] = recorded_description(about)
    if about is not None and not named:
        record |= about.documents.model_dump(include=set(NEWER_RULES), exclude_defaults=True)
    return record


def recorded_description(about: Description) -> dict[str, Any]:
    """A description as recorded in build.json. Rules that earlier versions lack are recorded only if set, so that
    what those versions started can be resumed."""
    # Without the paths: input files may be moved between runs, but must be the same files.
    found = about.model_dump(mode="json", exclude={"sources": {"__all__": {"inputs"}}})
    rules = about.documents.model_dump(include=set(NEWER_RULES), exclude_defaults=True)
    for name in NEWER_RULES:
        if name not in rules:
            del found["documents"][name]
    return found


def pack_options(
    sequence_length: int,
    packing: str,
    bins: Sequence[int],
    probability: float,
    columns: Sequence[str],
    seed: int,
    shard_size: float,
) -> PackOptions:
    """Validated packing options, without weights. Raises CorpusError naming the argument and the rule."""
    least, pairs = MIN_SEQUENCE_LENGTH, packing in ("nsp", "sop")
    bins = (*bins, sequence_length)
    rising = all(a < b for a, b in itertools.pairwise(bins))
    check_rules(
        (
            (
                least <= sequence_length <= MAX_LENGTH,
                "sequence length",
                sequence_length,
                f"from {least} to {MAX_LENGTH:,}",
            ),
            (sequence_length < 2**16 or not pairs, "sequence length", sequence_length, "below 65,536 for pairs"),
            (packing in PACKINGS, "packing", packing, f"one of {', '.join(PACKINGS)}"),
            (len(bins) == 1 or packing == "documents", "bins", bins[:-1], "omitted: only packing documents uses them"),
            (
                rising and bins[0] >= least,
                "bins",
                bins[:-1],
                f"ascending, from {least} to below the sequence length",
            ),
            (0 < probability < 1, "pair probability", probability, "above 0 and below 1"),
            (
                pairs or probability == PAIR_PROBABILITY,
                "pair probability",
                probability,
                "omitted: only packings nsp and sop use it",
            ),
            (set(columns) <= set(PLANES), "columns", ", ".join(columns), f"of {', '.join(PLANES)}"),
            (0 < shard_size <= _MAX_MB, "shard size", shard_size, f"above 0 and at most {_MAX_MB:g} (MB)"),
        )
    )
    ordered = tuple(plane for plane in PLANES if plane in columns)
    return PackOptions(sequence_length, packing, bins, probability, ordered, (), seed, shard_size)


def check_source_arguments(
    workers: int, seed: int, held_out: float, documents: str, work_size: float | None, held_out_by: str = "document"
) -> None:
    """Raise CorpusError for an argument out of range, naming it and the rule."""
    check_rules(
        (
            (1 <= workers <= MAX_WORKERS, "workers", workers, f"from 1 to {MAX_WORKERS:,}"),
            (0 <= seed < 2**63, "seed", seed, "from 0 to 2^63 - 1"),
            (0 <= held_out < 1, "held-out share", held_out, "from 0 to below 1"),
            (held_out_by in SPLITS, "held out by", held_out_by, f"one of {', '.join(SPLITS)}"),
            (
                held_out > 0 or held_out_by == "document",
                "held out by",
                held_out_by,
                "omitted: no held-out share is given (--held-out)",
            ),
            (documents in DOCUMENTS, "documents", documents, f"one of {', '.join(DOCUMENTS)}"),
            (
                work_size is None or 0 < work_size <= _MAX_MB,
                "work size",
                work_size,
                f"above 0 and at most {_MAX_MB:g} (MB)",
            ),
        )
    )


def check_rules(rules: Sequence[tuple[bool, str, Any, str]]) -> None:
    """Raise CorpusError for the first rule (holds, argument, value, what it must be) that does not hold."""
    for holds, name, value, rule in rules:
        if not holds:
            raise CorpusError(f"{name} {value!r}: must be {rule}")
