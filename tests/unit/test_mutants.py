"""Mutants still apply: a mutant whose line has changed would silently test nothing."""

import ast

import pytest

from tests.mutation.mutants import MUTANTS, ROOT, Mutant, MutationError


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_every_mutant_applies(mutant: Mutant) -> None:
    mutated = mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    compile(mutated, mutant.file, "exec")
    assert mutant.after != mutant.before
    assert "\n" not in mutant.before + mutant.after
    file, _, name = mutant.test.partition("::")
    functions = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    assert not name or any(isinstance(node, ast.FunctionDef) and node.name == name for node in functions), mutant.test


def test_mutants_have_different_names() -> None:
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("text", ["x = 1\n", "x = 2 + 2\n"])
def test_a_mutant_that_does_not_apply_is_an_error(text: str) -> None:
    with pytest.raises(MutationError, match=r"must occur once; adapt the mutant 'two' in .*mutants\.toml"):
        Mutant("two", "file.py", "2", "3", "test").apply(text)
