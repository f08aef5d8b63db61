"""What preflight checks besides links, with simulated hosts: each fault is found, with its remedy, and all at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.hosts import needs, node, plan
from cluster.hosts.checks import GIB
from maskvr_ds.config import load_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.training.setup import encoder_config
from tests.support.corpora import make_corpus
from tests.unit.cluster.test_plan import Hosts, hosts, run

__all__ = ["hosts"]  # a fixture

GOOD = {
    "memory": 64 * GIB,
    "shared_memory": GIB,
    "compiler": "/usr/bin/g++",
    "triton": True,
    "interfaces": ["lo", "ib0"],
    "shards": {},
}


@pytest.fixture
def good(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    for values in hosts.values.values():
        values |= GOOD
    return hosts


def test_a_good_cluster(good: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("preflight", tmp_path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line[9:].split("  ")[0].strip(): line.split()[0] for line in out.split("\n\n")[1].splitlines()}
    skipped = {"compiler", "Triton", "interconnect"}
    assert {name for name, state in rows.items() if state == "skipped"} == skipped
    assert {state for name, state in rows.items() if name not in skipped} == {"ok"}
    assert rows.keys() >= {"configuration", "files", "hosts", "software", "output_dir", "corpora", "port", "disk"}
    assert rows.keys() >= {"GPUs", "GPU memory", "shared memory", "checkpoints", "memory", "clocks", "other jobs"}
    assert not (tmp_path / "run").exists()


def change(hosts: Hosts, **values: Any) -> None:
    hosts.values["b"] |= values


FAULTS: dict[str, tuple[Callable[[Hosts], None], list[str], str]] = {
    "memory": (
        lambda h: change(h, memory=GIB // 2),
        [],
        "b: 0.5 GiB of memory are available, its ranks (1) need at least 1",
    ),
    "shared memory": (
        lambda h: change(h, shared_memory=2**26, gpus={"names": ["H100"] * 8, "driver": "1"}),
        [],
        "b: 64 MiB free in /dev/shm, NCCL needs about 1024 for 8 ranks; ",
    ),
    "GPU memory": (
        lambda h: change(h, gpus={"names": ["H100"], "driver": "1", "used": [40_960]}),
        [],
        "b: GPU 0 has 40 GiB in use; end the process",
    ),
    "compiler": (lambda h: change(h, compiler=None), ["training.compile=layers"], "b: training.compile needs a C++"),
    "compiler on GPUs": (
        lambda h: change(h, triton=False),
        ["training.compile=layers"],
        "b: training.compile needs Triton, which is not installed there",
    ),
    "Triton": (lambda h: change(h, triton=False), ["optimizer.fused=true"], "b: optimizer.fused needs Triton"),
    "shards": (
        lambda h: change(h, shards={"/c": ["shard-0.arrow: Permission denied", "shard-1.arrow: Permission denied"]}),
        [],
        "b: /c/shard-0.arrow: Permission denied and 1 more; copy the corpus again",
    ),
    "batch": (lambda h: None, ["batch.global_size=63"], "batch.global_size 63 is not a multiple of"),
    "files": (lambda h: None, ["data.path=nowhere"], "nowhere: no such folder"),
    "hub": (
        lambda h: None,
        ["model={initialize_from: lab/no-model}"],
        "model.initialize_from lab/no-model: no such folder, and the model of this name is not in the cache",
    ),
    "invalid": (lambda h: None, ["batch.global_size=-1"], "batch.global_size"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(
    fault: str, good: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    damage, settings, message = FAULTS[fault]
    damage(good)
    words = [word for setting in settings for word in ("--set", setting)]
    if fault == "shared memory":
        good.values["a"]["gpus"] = good.values["b"]["gpus"]
        words += ["--set", "batch.global_size=288"]
    assert run("preflight", tmp_path, *words, slots="8" if fault == "shared memory" else "1") == 1
    out, err = capsys.readouterr()
    assert message in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert sum(line.startswith("failed ") for line in out.splitlines()) == 1, out


def test_all_faults_at_once(good: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(good, memory=1, compiler=None, free_bytes=2**20)
    words = ["--set", "training.compile=layers", "--set", "batch.global_size=63", "--set", "data.path=nowhere"]
    assert run("preflight", tmp_path, *words, "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    failed = {row["check"] for row in answer["checks"] if row["state"] == "failed"}
    assert failed == {"configuration", "files", "disk", "compiler"}
    assert len(answer["faults"]) == 4
    # Without a corpus the size of the model is not known.
    assert {"memory", "checkpoints"} <= {row["check"] for row in answer["checks"] if row["state"] == "skipped"}


def test_room_for_checkpoints(good: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big = "model={preset: bert-large}"
    change(good, free_bytes=11 * GIB)
    assert run("preflight", tmp_path, "--set", big, "--set", "checkpoint.keep_last=8") == 1
    assert "b: 11 GiB free on the disk of " in (err := capsys.readouterr().err)
    assert "the run's checkpoints need " in err


def test_size_of_a_checkpoint(tmp_path: Path) -> None:
    """Parameters as transformers counts them, and 20 bytes of each in fp32, as `save` expects."""
    corpus = make_corpus(tmp_path / "corpus", rows=5, words=20)
    config = load_config("demo_cpu", [f"data.path={corpus}", f"output_dir={tmp_path}/run"])
    number = needs.parameters(config)
    from data_pipeline.shards import Corpus

    model = MaskedLanguageModel(encoder_config(config.model, Corpus(corpus), None, pair_head=False))
    assert number == sum(parameter.numel() for parameter in model.parameters())
    assert needs.checkpoint_bytes(config, number) == 20 * number
    # keep_last is 2, and one is being written.
    assert needs.room_needed(config, number) == 3 * 20 * number


def test_corpora_that_only_the_hosts_see(good: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = {str(Path("local/c").absolute()): "ab" * 32, str(Path("local/c/held_out").absolute()): "cd" * 32}
    for values in good.values.values():
        values["manifests"] = manifests
    assert run("preflight", tmp_path, "--set", "data.path=local/c") == 0
    assert "the corpora are not on this machine, only on the hosts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value", "good"),
    [
        ("NCCL_SOCKET_IFNAME", "ib", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "eth,ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),
        ("GLOO_SOCKET_IFNAME", "ib0", True),
    ],
)
def test_interfaces(variable: str, value: str, good: bool) -> None:
    lines = needs.interface_errors({"n1": {"interfaces": ["lo", "ib0"]}}, {variable: value})
    assert lines == ([] if good else [f"n1: {variable}={value}, but its interfaces are lo, ib0; correct it"])


def test_report_of_this_machine(tmp_path: Path) -> None:
    """Shards are opened and measured."""
    corpus = make_corpus(tmp_path / "corpus", rows=50, words=20)
    (tmp_path / "token").touch()
    request = {"folder": str(tmp_path), "token": "token", "corpora": [str(corpus)], "port": 0}
    found = node.report(request)
    assert found["shards"] == {str(corpus): []}
    assert found["memory"] > 2**20
    assert "lo" in found["interfaces"]
    shard = next(corpus.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    size = shard.stat().st_size
    assert node.report(request)["shards"] == {str(corpus): [f"{shard.name}: {size:,} bytes, {size + 1:,} expected"]}
    shard.unlink()
    assert node.report(request)["shards"] == {str(corpus): [f"{shard.name}: No such file or directory"]}


def test_launcher_that_is_missing(
    good: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration is checked nevertheless."""
    monkeypatch.setattr(plan.checks, "launcher_error", lambda *_: "--launcher pdsh: pdsh not found; install it")
    assert run("preflight", tmp_path, "--set", "batch.global_size=63") == 1
    err = capsys.readouterr().err
    assert "error: --launcher pdsh: pdsh not found; install it" in err
    assert "error: batch.global_size 63 is not a multiple of" in err
