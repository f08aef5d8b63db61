"""Runs mutants (mutants.toml): the test named with each must fail on the changed line, and pass without the change.

    python -m tests.mutation.run                     all of them: a few minutes
    python -m tests.mutation.run LAMB divergence     those whose description or file has one of these words

Works in a copy of the sources. Status 1 if a mutant survives that is not marked as equivalent (or one that is marked
does not), if a test fails without any mutant, or if one cannot be run.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutation.mutants import MUTANTS, ROOT, Mutant, MutationError

COPIED = ("maskvr_ds", "data_pipeline", "cluster", "ds_configs", "tests", "docs")
# Limit per test. A mutant that never ends is noticed too.
_SECONDS = 600
_PASSED, _FAILED = 0, 1  # statuses of pytest; others: interrupted, nothing collected, usage
_ELSEWHERE = 99  # modules were not those of the copy
_OUTPUT = "pytest.log"


def run_tests(copy: Path, tests: Sequence[str]) -> bool:
    """Whether the tests pass in the copy. Raises MutationError if they cannot be run."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(copy, tests))
    process.start()
    process.join(_SECONDS * len(tests))
    if process.exitcode is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return False
    if process.exitcode not in (_PASSED, _FAILED):
        output = (copy / _OUTPUT).read_text(encoding="utf-8", errors="replace")
        raise MutationError(f"{' '.join(tests)}: pytest ended with status {process.exitcode}\n{output[-2000:]}")
    return process.exitcode == _PASSED


def _pytest(copy: Path, tests: Sequence[str]) -> None:
    """Run pytest in this process, a fork that has imported the large libraries already, with the modules of `copy`."""
    os.setsid()  # a group of its own, ranks that tests start included
    os.chdir(copy)
    output = os.open(_OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    # Bytecode of a mutant could be taken for that of the original, if it has the same length and time in seconds.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants")
    status = int(pytest.main([*options, *tests]))
    loaded = [name for name in ("maskvr_ds", "data_pipeline", "cluster") if name in sys.modules]
    elsewhere = [name for name in loaded if copy not in Path(str(sys.modules[name].__file__)).parents]
    sys.stdout.flush()
    os._exit(_ELSEWHERE if elsewhere else status)


def run_mutant(copy: Path, mutant: Mutant) -> str:
    """Apply the mutant, run its test, undo it; → "killed", "survived", or "equivalent" if that is expected."""
    path = copy / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(original), encoding="utf-8")
    try:
        survived = run_tests(copy, [mutant.test])
    finally:
        path.write_text(original, encoding="utf-8")
    if mutant.equivalent:
        return "equivalent" if survived else "killed, but marked as equivalent"
    return "survived" if survived else "killed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run mutants whose description or file has one of these words")
    words = [word.lower() for word in parser.parse_args().words]
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.what} {m.file}".lower() for word in words)]
    if not chosen:
        print("error: no mutant has one of these words", file=sys.stderr)
        return 1
    # Once, not in the process of every mutant. conftest first: it sets what the libraries read when they are imported.
    import tests.conftest  # noqa: F401, I001
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copy = Path(temporary).resolve()
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, copy)
        try:
            passed = run_tests(copy, sorted({mutant.test for mutant in chosen}))
        except MutationError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if not passed:
            print((copy / _OUTPUT).read_text(encoding="utf-8")[-2000:])
            print("error: a test fails without a mutant", file=sys.stderr)
            return 1
        print("| mutant | file | change | test | result | seconds |\n|---|---|---|---|---|---|", flush=True)
        results = []
        for mutant in chosen:
            started = time.monotonic()
            try:
                results.append(run_mutant(copy, mutant))
            except MutationError as error:
                results.append("error")
                print(f"error: {error}", file=sys.stderr, flush=True)
            change = f"`{mutant.before}` → `{mutant.after}`".replace("|", "\\|")
            test = mutant.test.removeprefix("tests/unit/")
            seconds = time.monotonic() - started
            print(f"| {mutant.what} | {mutant.file} | {change} | {test} | {results[-1]} | {seconds:.0f} |", flush=True)
    good = sum(result in ("killed", "equivalent") for result in results)
    print(f"\n{results.count('killed')} of {len(results)} killed, {results.count('equivalent')} equivalent")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
