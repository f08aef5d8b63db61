"""Two builds that start together in one folder: one of them has it, the other one changes nothing."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import files, outputs
from data_pipeline.files import LOCK, CorpusError, lock_file, locked_folder, write_json
from data_pipeline.manifest import MANIFEST

BUILD = "build.json"


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Run the actions in threads that start together; returns what each returned, or its CorpusError."""
    barrier, answers = threading.Barrier(len(actions)), [None] * len(actions)

    def run(number: int) -> None:
        barrier.wait()
        try:
            answers[number] = actions[number]()
        except CorpusError as error:
            answers[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_of_two_builds_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if each of them looks before either has written build.json."""

    def slowly(path: Path, value: object) -> None:
        time.sleep(0.05)
        write_json(path, value)

    monkeypatch.setattr(outputs, "write_json", slowly)
    for number in range(10):
        output, done = tmp_path / str(number), threading.Event()

        def build(seed: int, output: Path = output, done: threading.Event = done) -> dict[str, Any]:
            try:
                with outputs.claim(output, {"seed": seed}) as work:
                    (work / "results" / "unit").touch()
                    done.wait(0.2)
                    return json.loads((output / BUILD).read_text())
            finally:
                done.set()

        answers = together(lambda: build(1), lambda: build(2))
        (winner,) = [answer for answer in answers if isinstance(answer, dict)]
        (refused,) = [answer for answer in answers if isinstance(answer, CorpusError)]
        assert winner == {"seed": 1 + answers.index(winner)}
        assert "another build is running in this folder" in str(refused)
        assert json.loads((output / BUILD).read_text()) == winner
        assert not (output / LOCK).exists()


def test_a_folder_that_is_removed_while_it_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdir finds it, and then that it is no folder."""
    make, folder, calls = Path.mkdir, tmp_path / "out", []

    def vanishing(path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(path)
        make(path, **options)

    monkeypatch.setattr(Path, "mkdir", vanishing)
    with locked_folder(folder) as new:
        assert new
    assert calls == [folder, folder]
    (tmp_path / "link").symlink_to("nowhere")
    for taken in (tmp_path / "link", Path(__file__)):
        with pytest.raises(OSError, match=r"File exists"), locked_folder(taken):
            pass


def test_a_build_that_fails_takes_nothing_of_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes what it made while the next one waits, which then has the folder to itself."""
    output, removing = tmp_path / "out", threading.Event()
    remove = shutil.rmtree

    def slowly(folder: Path, **options: Any) -> None:
        remove(folder, **options)
        if folder.name == ".build":
            removing.set()
            time.sleep(0.2)

    monkeypatch.setattr(shutil, "rmtree", slowly)

    def fail() -> None:
        with outputs.claim(output, {"seed": 1}):
            raise ZeroDivisionError

    def failing() -> None:
        with pytest.raises(ZeroDivisionError):
            fail()

    def following() -> list[str]:
        removing.wait()
        # The first build holds the folder until it has cleaned up.
        deadline = time.monotonic() + 10
        while True:
            try:
                with outputs.claim(output, {"seed": 1}) as work:
                    (work / "results" / "unit").touch()
                    (output / "tokens-00000.train").touch()
                    time.sleep(0.5)
                    return sorted(tree(output))
            except CorpusError:
                assert time.monotonic() < deadline

    _, found = together(failing, following)
    assert found == [".build/lock", ".build/results/unit", BUILD, "tokens-00000.train"]


def test_a_refused_build_changes_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    finished = tmp_path / "finished"
    with outputs.claim(finished, {"seed": 1}):
        (finished / MANIFEST).write_text("{}")
    killed = tmp_path / "killed"
    with outputs.claim(killed, {"seed": 1}) as work:
        (work / "results" / "unit").touch()
    for folder, why in ((mine, "holds no build"), (finished, "seed was 1, is now 2"), (killed, "seed was 1")):
        before = tree(folder)
        with pytest.raises(CorpusError, match=why), outputs.claim(folder, {"seed": 2}):
            raise AssertionError("claimed")
        assert tree(folder) == before
    assert sorted(tree(finished)) == [BUILD, MANIFEST], "the work folder is gone"


def test_other_inputs_are_found_in_linear_time(tmp_path: Path) -> None:
    inputs = [[f"{number}.txt", 10] for number in range(30_000)]
    outputs.claim_arguments(tmp_path, {"sources": inputs})
    begin = time.process_time()
    with pytest.raises(
        CorpusError, match=r"sources was \[\['0.txt', 10\]\], is now \[\['a.txt', 1\], \['b.txt', 2\]\]"
    ):
        outputs.claim_arguments(tmp_path, {"sources": [*inputs[1:], ["a.txt", 1], ["b.txt", 2]]})
    assert time.process_time() - begin < 3


def test_a_lock_of_a_deleted_file_excludes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking the former holder deletes the file and another process makes a new one."""
    path, flock, first = tmp_path / "lock", files.fcntl.flock, [True]

    def after_a_change(*arguments: Any) -> None:
        flock(*arguments)
        if first:
            first.clear()
            path.unlink()
            path.touch()

    monkeypatch.setattr(files.fcntl, "flock", after_a_change)
    with lock_file(path) as held:
        assert path.samefile(f"/proc/self/fd/{held.fileno()}")
        with pytest.raises(BlockingIOError):
            lock_file(path)


def test_a_folder_that_another_command_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    with (
        locked_folder(tmp_path / "out") as new,
        pytest.raises(CorpusError, match="out: another command is starting there"),
        locked_folder(tmp_path / "out"),
    ):
        raise AssertionError("locked twice")
    assert new
    assert list((tmp_path / "out").iterdir()) == []
