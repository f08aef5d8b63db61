"""The mutants of mutants.toml, where the fields are described."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.toml")


class MutationError(Exception):
    """A mutant that does not apply, or a test that cannot be run."""


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    before: str
    after: str
    test: str
    equivalent: str = ""

    def apply(self, text: str) -> str:
        """The mutated text of the file. Raises MutationError if the fragment does not occur exactly once."""
        if (found := text.count(self.before)) != 1:
            raise MutationError(
                f"{self.file}: {self.before!r} occurs {found} times, must occur once; adapt the mutant {self.what!r} "
                f"in {TABLE.relative_to(ROOT)}"
            )
        return text.replace(self.before, self.after)


MUTANTS = [Mutant(**entry) for entry in tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]]
