"""The table of checks in docs/how-to/judge-a-run.md: `python -m tests.unit.analysis.health.page`."""

from maskvr_ds.analysis.health.checks import CHECKS
from tests.support.documents import ROOT

PAGE = ROOT / "docs/how-to/judge-a-run.md"
_START, _END = "<!-- checks -->\n", "<!-- end of checks -->"


def page(text: str) -> str:
    """The page with its table made again."""
    before, _, rest = text.partition(_START)
    after = rest.partition(_END)[2]
    rows = ["| check | what is judged | thresholds | source or reason |", "|---|---|---|---|"]
    for check in CHECKS.values():
        limits = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in check.thresholds.items())
        rows.append(f"| {check.name} | {check.asks} | {limits or '–'} | {check.source} |")
    return before + _START + "\n" + "\n".join(rows) + "\n\n" + _END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
