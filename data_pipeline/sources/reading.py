"""How records are read: what is an error, what is skipped and counted, and limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from data_pipeline.files import CorpusError
from data_pipeline.sources.inputs import Source

# Below this size, no file expands too much.
_SMALL = 1 << 30
RULES = ("error", "skip")


@dataclass(frozen=True)
class Limits:
    """Limits against files that expand without bound.

    record: characters of one record, such as a line of JSON; expansion: bytes of text per byte of the file, if there is
    more than 1 GB of text.
    """

    record: int = 256_000_000
    expansion: float = 1000.0

    def check_expansion(self, source: Source, text_bytes: int, where: str = "") -> None:
        """Raise CorpusError if `text_bytes` of text are too much for the size of the file."""
        if text_bytes > _SMALL and text_bytes > self.expansion * source.bytes:
            raise CorpusError(
                f"{source.path}: {where}more than {self.expansion:,.10g} bytes of text per byte of the file "
                f"({source.bytes:,} bytes, {text_bytes:,} of text so far). "
                "If this is intended, raise --max-expansion, else remove the file"
            )


LIMITS = Limits()


@dataclass
class Reading:
    """Options for reading a source.

    lenient: decode invalid UTF-8 to lone surrogates ("surrogateescape") instead of raising; no_text: rule for records
    whose text is null or missing; bad_records: rule for records that cannot be read. `skipped` counts the records that
    the rules skip, by the name of the rule.
    """

    lenient: bool = False
    no_text: str = "error"
    bad_records: str = "error"
    limits: Limits = LIMITS
    skipped: Counter[str] = field(default_factory=Counter)

    def no_text_at(self, fault: str, count: int = 1) -> None:
        """Count records without text. Raises CorpusError with the message `fault` unless they are skipped."""
        self._apply("no_text", self.no_text, fault, count)

    def bad_record_at(self, fault: str) -> None:
        """Count a record that cannot be read. Raises CorpusError with the message `fault` unless it is skipped."""
        self._apply("bad_records", self.bad_records, fault, 1)

    def _apply(self, name: str, rule: str, fault: str, count: int) -> None:
        if rule == "error":
            option = f"--{name.replace('_', '-')} skip, or {name}: skip in a description, drops such records"
            raise CorpusError(f"{fault} ({option})")
        self.skipped[name] += count

    def check_length(self, text: str, where: str) -> None:
        """Raise CorpusError if a text is too long for one record."""
        if len(text) > self.limits.record:
            self.too_long(where)

    def too_long(self, where: str) -> None:
        """Raise CorpusError for a record at `where` that exceeds the limit."""
        size = f"{self.limits.record / 1e6:g} million characters"
        raise CorpusError(
            f"{where}: a record of more than {size}. If this is intended, raise --max-record, else remove it"
        )
