"""Locks of compiled operations: one that a killed build has left is avoided, or named, and never waited for."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from maskvr_ds.engine import engine
from maskvr_ds.optim import build_locks
from maskvr_ds.optim.build_locks import SHARED_MEMORY_OP, BuildLockError, abandoned_lock, check_build_lock

# What a script does with the optimizer, up to the place where DeepSpeed compiles for a CPU.
SCRIPT = """
from maskvr_ds.lamb import Lamb
import deepspeed
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
print("initialised", deepspeed.comm.get_world_size())
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an operation `adam`, which a killed build has left."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "adam").mkdir()
    (tmp_path / "adam" / "lock").touch()
    return tmp_path / "adam" / "lock"


@pytest.mark.parametrize("given", [True, False])
def test_the_folder_is_torchs(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "given"))
    if not given:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert Path(_get_build_directory("adam", verbose=False)) == build_locks._extensions_folder() / "adam"


def test_a_lock_is_abandoned_if_no_process_has_it_open(lock: Path) -> None:
    assert abandoned_lock("another") is None
    assert abandoned_lock("adam") == lock
    with lock.open(encoding="utf-8"):
        assert abandoned_lock("adam") is None, "as torch's builder holds it"
    assert abandoned_lock("adam") == lock


def test_an_old_lock_is_an_error_and_a_young_one_a_warning(lock: Path) -> None:
    with pytest.warns(UserWarning, match=f"{lock}: .* stop it and delete the file"):
        check_build_lock("adam")
    old = time.time() - 7200
    os.utime(lock, (old, old))
    with pytest.raises(BuildLockError, match=rf"{lock}: left by a killed build .* 2.0 hours ago; .* Delete the file"):
        check_build_lock("adam")
    with lock.open(encoding="utf-8"), warnings.catch_warnings():
        warnings.simplefilter("error")
        check_build_lock("adam")


def test_the_trainer_looks_for_the_lock_of_what_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(engine, "check_build_lock", asked.append)
    ours = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
    engine._check_build_locks(ours)
    engine._check_build_locks({**ours, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    engine._check_build_locks({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
    engine._check_build_locks({})
    assert asked == ["fused_adam", "cpu_adam"]


def test_lamb_alone_does_not_wait_for_a_lock_that_a_killed_build_has_left(tmp_path: Path) -> None:
    left = tmp_path / SHARED_MEMORY_OP / "lock"
    left.parent.mkdir()
    left.touch()
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "15499"}
    environment = alone | place | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "initialised 1" in ended.stdout
    assert f"{left}: left by a build that was killed" in ended.stderr
    assert left.exists(), "it may be another host's"
