"""User errors in training: one clear error, all ranks stop, nothing is lost."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskvr_ds.run_folder import fence
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, run_command, train_all
from tests.support.corpora import change_manifest, make_corpus

PLAIN: dict[str, Any] = {
    "model": NO_DROPOUT,
    "deepspeed": "zero1_fp32",
    "schedule": {"warmup_steps": 0},
    "evaluation": {"every_steps": 0},
}
# Name → pattern of the error. `prepare` sets each up; all run in turn on the same two ranks.
EXPECTED = {
    "batch does not divide": r"ConfigError: batch.global_size 10 is not a multiple of batch.micro_size 4 × 2 ranks",
    "output not empty": "ConfigError: output_dir .*: not empty and not a run.s folder",
    "no corpus": "CorpusError: .*manifest.json: not found",
    "flipped byte": "CorpusError: .*shard-00001.arrow: sha256 .* expected",
    "truncated shard": "CorpusError: .*shard-00000.arrow: .* bytes expected",
    "missing shard": "CorpusError: .*shard-00001.arrow: shard is missing",
    "leaving path": "CorpusError: .*'../shard-00000.arrow' is not a plain file name",
    "other tokenizer": "CorpusError: .*built with the tokenizer",
    "long sequences": "ConfigError: .*sequences of 32 tokens exceed model.max_position_embeddings 16",
    "no held-out corpus": "ConfigError: .*no held-out corpus; build with --held-out",
    "auto in a folder of something else": "ConfigError: .*not empty and not a run's folder",
    "held-out of another length": "ConfigError: .*sequence_length 16 differs from the training corpus' 32",
    "owned key": "ConfigError: .*sets gradient_clipping to 1.0",
    "no checkpoint to resume": "CheckpointError: .*contains no complete checkpoint",
    "only broken checkpoints": "CheckpointError: .*none of step-00000002 is intact",
    "resume with another tokenizer": "CheckpointError: .*belongs to another run: tokenizer was",
    "resume with another length": "CheckpointError: .*sequence_length was 32, is 16",
    "resume with another model": "CheckpointError: .*another run: model.hidden_size was 32, is 64",
    "resume with another seed": "CheckpointError: .*seed was 0, is 1",
    "resume with another precision": "CheckpointError: .*dtype was float32, is bfloat16",
    "resume with a damaged checkpoint": "CheckpointError: .*weights.safetensors: the SHA-256 differs",
    "resume what another job is at": f"FencedError: .*in use by process {os.getpid()} on .*end that job first",
}


def prepare(name: str, folder: Path, good: Path, trained: Path) -> tuple[dict[str, Any], str | None]:
    """The configuration and --resume of one case."""
    corpus = good
    if name in ("flipped byte", "truncated shard", "missing shard", "leaving path", "other tokenizer"):
        corpus = folder / "corpus"
        shutil.copytree(good, corpus)
    values = configuration(folder / "run", corpus, steps=4, **PLAIN)
    shard, other = corpus / "shard-00000.arrow", corpus / "shard-00001.arrow"
    resume = None
    if name.startswith("resume"):
        values["output_dir"] = str(folder / "run")
        shutil.copytree(trained, folder / "run")
        resume = "auto"
    match name:
        case "batch does not divide":
            values["batch"] = {"global_size": 10, "micro_size": 4}
        case "output not empty":
            (folder / "run").mkdir()
            (folder / "run" / "precious").write_text("data")
        case "no corpus":
            values["data"]["path"] = str(folder)
        case "flipped byte":
            data = bytearray(other.read_bytes())
            data[len(data) // 2] ^= 1
            other.write_bytes(data)
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-8])
        case "missing shard":
            other.unlink()
        case "leaving path":
            change_manifest(corpus, lambda manifest: manifest["shards"][0].update(file="../shard-00000.arrow"))
        case "other tokenizer":
            path = corpus / "tokenizer" / "tokenizer.json"
            path.write_text(path.read_text() + "\n")
        case "long sequences":
            values["model"]["max_position_embeddings"] = 16
        case "no held-out corpus":
            values["evaluation"]["every_steps"] = 1
        case "auto in a folder of something else":
            (folder / "run").mkdir()
            (folder / "run" / "precious").write_text("data")
            resume = "auto"
        case "held-out of another length":
            values["evaluation"]["every_steps"] = 1
            values["data"]["held_out_path"] = str(make_corpus(folder / "short", rows=9, length=16))
        case "owned key":
            (folder / "ds.json").write_text('{"gradient_clipping": 1.0}')
            values["deepspeed"] = str(folder / "ds.json")
        case "no checkpoint to resume":
            resume = str(folder)
        case "only broken checkpoints":
            (folder / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
            (folder / "run" / "config.yaml").write_text("schema: 2\n")
            resume = "auto"
        case "resume what another job is at":
            fence.take(folder / "run", 2)  # by this process, which stays alive
        case "resume with another tokenizer":
            values["data"]["path"] = str(make_corpus(folder / "corpus", rows=200, words=60))
        case "resume with another length":
            values["data"]["path"] = str(make_corpus(folder / "corpus", rows=200, length=16))
        case "resume with another model":
            values["model"]["hidden_size"] = 64
        case "resume with another seed":
            values["seed"] = 1
        case "resume with another precision":
            values["deepspeed"] = "zero1_bf16"
        case "resume with a damaged checkpoint":
            path = complete_checkpoints(folder / "run")[-1] / "weights.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    return values, resume


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("good") / "corpus", rows=200)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent of one folder per case."""
    return tmp_path_factory.mktemp("cases")


@pytest.fixture(scope="module")
def outcomes(good: Path, cases: Path) -> dict[str, list[str | None]]:
    """Case → errors of the two ranks; "trained" is an intact run that the resumes copy."""
    trained = cases / "trained"
    values = configuration(trained, good, steps=2, **PLAIN)
    assert run_ranks(train_all, 2, [(values, None)]) == [[None], [None]]
    jobs = []
    for name in EXPECTED:
        case = cases / name.replace(" ", "-")
        case.mkdir()
        jobs.append(prepare(name, case, good, trained))
    # Finally, a correct resume works.
    jobs.append(({**values, "training": {"steps": 4}}, "auto"))
    ranks = run_ranks(train_all, 2, jobs)
    assert ranks[0][-1] is None
    assert column(trained, "step") == [(1,), (2,), (3,), (4,)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(EXPECTED)}


@pytest.mark.parametrize("name", EXPECTED)
def test_all_ranks_stop_and_one_reports_the_error(outcomes: dict[str, list[str | None]], name: str) -> None:
    said = outcomes[name]
    assert all(said), f"a rank continued: {said}"
    # One rank raises the error itself; the others name that rank.
    assert sum(not str(text).startswith("RemoteError: rank ") for text in said) == 1, said
    assert any(re.search(EXPECTED[name], str(text), re.DOTALL) for text in said), said


@pytest.mark.usefixtures("outcomes")
def test_no_data_is_lost(cases: Path) -> None:
    """A folder that is not empty keeps its content; a refused resume leaves the run unchanged."""
    kept = cases / "output-not-empty" / "run"
    assert [p.name for p in kept.iterdir()] == ["precious"]
    assert (kept / "precious").read_text() == "data"
    refused = cases / "resume-with-another-seed" / "run"
    assert [p.name for p in complete_checkpoints(refused)] == ["step-00000002"]
    assert yaml.safe_load((refused / "config.yaml").read_text())["seed"] == 0
    assert column(refused, "step") == [(1,), (2,)]


def test_commands_end_with_one_error_and_a_status(good: Path, tmp_path: Path) -> None:
    """Through the real launcher, on two ranks: a nonzero status, and the error is printed once."""
    values = configuration(tmp_path / "run", good, steps=9, batch={"global_size": 10, "micro_size": 4})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    result = run_command("train", "--config", config, "--num-gpus", 2)
    assert result.returncode != 0
    assert result.stderr.count("error: batch.global_size 10 is not a multiple") == 1
    assert not (tmp_path / "run").exists()

    unknown = run_command("train", "--config", config, "--num-gpus", 2, "--set", "optimizer.lrr=1")
    assert (unknown.returncode, unknown.stderr.count("error:")) == (1, 1)
    assert "optimizer.lrr: unknown key" in unknown.stderr
    hostfile = run_command("train", "--config", config, "--hostfile", tmp_path / "hosts")
    assert (hostfile.returncode, hostfile.stderr.count("error:")) == (1, 1)
    assert "no such file" in hostfile.stderr
    export = run_command("export", "--checkpoint", tmp_path / "nothing", "--output", tmp_path / "model")
    assert (export.returncode, export.stderr.count("error:")) == (1, 1)
    assert not (tmp_path / "model").exists()
