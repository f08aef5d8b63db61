"""The page lists the checks with the thresholds that are used."""

from tests.unit.analysis.health.page import PAGE, page


def test_the_table_is_that_of_the_checks() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run python -m tests.unit.analysis.health.page"
