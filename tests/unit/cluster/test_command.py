"""`python -m cluster slurm`: errors are reported before submission; a job keeps the settings it was submitted with."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from cluster.__main__ import main
from cluster.slurm.command import config_file, parse_nodes, parse_time
from cluster.slurm.script import SlurmError
from cluster.slurm.submission import dependency_options
from maskvr_ds.config import RunConfig, load_config
from maskvr_ds.run_folder.checkpoints import write_origin
from tests.support.corpora import make_corpus
from tests.support.scripts import build_words
from tests.unit.checkpoint.test_checkpoint import write as write_checkpoint
from tests.unit.cluster.test_script import run_script


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("2-0:0:5", 172805)],
)
def test_time_limit_formats_of_sbatch(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


def test_nodes() -> None:
    assert list(parse_nodes("2-4")) == [2, 3, 4]
    for text in ("0", "4-2", "-1", "2-", "two", "1,2", ""):
        with pytest.raises(SlurmError, match="N or N-M"):
            parse_nodes(text)


SCRIPTS = ["data.sbatch", "job.sbatch"]
# A run on an existing corpus.
BASE = ["slurm", "--config", "demo_cpu", "--set", "evaluation.every_steps=0"]
ON_CPUS = ["--gpus-per-node", "0", "--tasks-per-node", "1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus", rows=10, words=10)


def on(corpus: Path) -> list[str]:
    return [*BASE, "--set", f"data.path={corpus}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--nodes", "1-3", *ON_CPUS, "--set", "batch.global_size=64", "--set", "batch.micro_size=16"],
            "3 nodes: --no",
        ),
        (["--nodes", "3", *ON_CPUS, "--set", "batch.global_size=64", "--set", "batch.micro_size=16"], "3 nodes: batch"),
        (["--nodes", "1", "--gpus-per-node", "0"], "or 0 and --tasks-per-node for CPUs"),
        (["--nodes", "1", "--gpus-per-node", "2", "--tasks-per-node", "1"], "a rank has one GPU"),
        (["--nodes", "1", *ON_CPUS, "--time", "5"], "300 s, but the last checkpoint starts 300 s before"),
        (["--nodes", "1", *ON_CPUS, "--time", "soon"], "--time soon"),
        (["--nodes", "1", *ON_CPUS, "--seeds", "1", "1"], "different numbers"),
        (["--nodes", "1-100000000", *ON_CPUS], "--nodes '1-100000000': expected N or N-M, 1 ≤ N ≤ M ≤ 10,000"),
        (["--nodes", "9" * 5000, *ON_CPUS], "… (5,000 characters): expected N or N-M"),
        (["--nodes", "1", *ON_CPUS, "--sbatch", "nodes=3"], "--sbatch nodes=3: nodes cannot be set here: use --nodes"),
        (["--nodes", "1", *ON_CPUS, "--sbatch", "time=10"], "--sbatch time=10: time cannot be set here: use --time"),
        (["--nodes", "1", *ON_CPUS, "--sbatch", "array=0-3"], "use --seeds for one run per task"),
        (["--nodes", "1", *ON_CPUS, "--sbatch", "comment="], "--comment '': "),
        (["--nodes", "1", *ON_CPUS, "--job-name", "a\nb"], "--job-name 'a"),
        (["--nodes", "1", *ON_CPUS, "--build-data", "'open"], "--build-data"),
        (["--nodes", "1", *ON_CPUS, "--build-data", "--output corpus"], "arguments are required: --tokenizer"),
        (["--nodes", "1", *ON_CPUS, "--set", "data.path=none"], "none: no corpus there (manifest.json is missing); "),
        (["--nodes", "1", *ON_CPUS, "--set", "evaluation.every_steps=9"], "held_out: no held-out corpus there"),
        (["--nodes", "1", *ON_CPUS, "--set", "model.max_position_embeddings=16"], "sequences of 32 tokens exceed"),
        (
            ["--nodes", "1", *ON_CPUS, "--container", "i.sif", "--set", "output_dir=a:b"],
            "cannot be bound into a container",
        ),
        (["--nodes", "1", *ON_CPUS, "--venv", "nowhere"], "--venv nowhere: no virtual environment there"),
        (["--nodes", "1", *ON_CPUS, "--resume", "nowhere"], "nowhere: no such folder"),
        (["--nodes", "1", *ON_CPUS, "--resume", "x", "--seeds", "1"], "--resume x: a checkpoint belongs to one seed"),
        (["--nodes", "1", *ON_CPUS, "--set", "deepspeed=zero9"], "zero9"),
        (["--nodes", "1", *ON_CPUS, "--set", "no.such=1"], "unknown key"),
    ],
)
def test_invalid_options_are_rejected(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*on(corpus), "--print", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"model": "{initialize_from: bert}"}, "its tokenizer has 15 tokens, but the model in bert has 300"),
        ({"model": "{initialize_from: none/at/all}"}, "initialize_from none/at/all: no such folder"),
        ({"deepspeed": "own.json"}, "own.json: sets train_batch_size to 32, which the run's config owns"),
        ({"model": "{preset: roberta-base, settings: {hiden_size: 8}}"}, "settings.hiden_size: unknown key"),
        ({"masking.strategy": "auto", "masking.auto.rows": "1000"}, "masking.auto.rows 1000: .* has only 10 rows"),
    ],
)
def test_what_the_configuration_names_is_checked(
    sets: dict[str, str],
    message: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `maskvr config` does, so that no job waits in the queue to fail at its first step."""
    monkeypatch.chdir(tmp_path)
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(**small, vocab_size=300)).save_pretrained("bert")
    Path("own.json").write_text('{"zero_optimization": {"stage": 1}, "train_batch_size": 32}', encoding="utf-8")
    text = "output_dir: run\ntraining: {steps: 5}\nbatch: {global_size: 8, micro_size: 8}\n"
    Path("run.yaml").write_text(text, encoding="utf-8")
    values = {"data.path": str(corpus), "evaluation.every_steps": 0, **sets}
    words = ["slurm", "--config", "run.yaml", "--nodes", "1", *ON_CPUS, "--print"]
    words += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    assert main(words) == 1
    assert not (printed := capsys.readouterr()).out
    assert re.search(message, printed.err), printed.err
    if "initialize_from" in sets.get("model", ""):
        # A run that has started needs the folder no longer.
        Path("run").mkdir()
        Path("run/config.yaml").write_text("schema: 3\n", encoding="utf-8")
        assert main(words) == 0


def test_settings_of_other_architectures_on_a_login_node_without_torch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ranks check them again."""
    words = [*on(corpus), "--nodes", "1", *ON_CPUS, "--print", "--set", f"output_dir={tmp_path}/run"]
    words += ["--set", "model={preset: roberta-base, settings: {hiden_size: 8}}"]
    assert main(words) == 1
    assert "unknown key of RobertaConfig" in capsys.readouterr().err
    for package in ("torch", "transformers"):
        monkeypatch.setattr("maskvr_ds.training.references.find_spec", lambda name, gone=package: name != gone or None)
        assert main(words) == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("--held-out 1", "held-out share 1.0: must be from 0 to below 1"),
        ("--held-out-by file", "held out by 'file': must be omitted: no held-out share is given (--held-out)"),
        ("--bins 16", "bins (16,): must be omitted: only packing documents uses them"),
        ("--tokenizer none", "--tokenizer none: no such folder, and the model of this name is not in the cache"),
        ("--tokenizer texts", "texts: no tokenizer there (neither tokenizer.json nor vocab.txt)"),
        ("--output texts", "texts: output folder is not empty and holds no build"),
        ("--output texts/a.txt", "texts/a.txt: is a file"),
    ],
)
def test_invalid_build_is_rejected(
    build: str,
    message: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = build_words(tmp_path, corpus)
    (tmp_path / "my texts").rename("texts")
    words[1] = "texts"
    options = ["--nodes", "1", *ON_CPUS, "--build-data", f"{shlex.join(words)} {build}"]
    assert main([*on(tmp_path / "built"), "--print", *options]) == 1
    assert f"error: --build-data: {message}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "texts"]


def directives(text: str) -> list[list[str]]:
    """#SBATCH lines of each script."""
    scripts = text.split("#!/bin/bash\n")[1:]
    return [[line.removeprefix("#SBATCH --") for line in s.splitlines() if line.startswith("#SBATCH")] for s in scripts]


def test_sbatch_options_reach_the_right_jobs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*on(tmp_path / "built"), "--print", "--nodes", "1", *ON_CPUS, "--partition", "gpu", "--qos", "high"]
    words += ["--build-data", shlex.join(build_words(tmp_path, corpus)), "--mem", "900G"]
    both, training = ["reservation=big", "comment=mine"], ["exclusive", "gres=gpu:8"]
    words += [word for option in both + training for word in ("--sbatch", option)]
    assert main(words) == 0
    data, job = directives(capsys.readouterr().out)
    assert set(job) >= {"qos=high", "mem=900G", *both, *training}
    assert set(data) >= {"qos=high", "partition=gpu", *both}
    assert not {"mem=900G", *training} & set(data)
    assert main([*words, "--build-partition", "cpu", "--build-qos", "low", "--build-mem", "4G"]) == 0
    data, job = directives(capsys.readouterr().out)
    assert set(job) >= {"qos=high", "mem=900G", "partition=gpu", *both}
    assert set(data) >= {"qos=low", "mem=4G", "partition=cpu", "comment=mine"}
    assert "reservation=big" not in data


def test_the_time_of_a_build_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    build = ["--build-data", shlex.join(build_words(tmp_path, corpus)), "--build-time", "2h"]
    assert main([*on(tmp_path / "built"), "--nodes", "1", *ON_CPUS, "--print", *build]) == 1
    captured = capsys.readouterr()
    assert "--build-time 2h: expected minutes" in captured.err
    assert captured.out == ""


def test_missing_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main([*on(corpus), "--nodes", "1", *ON_CPUS, "--submit"]) == 1
    assert "sbatch: not found" in capsys.readouterr().err


def test_scripts_are_written_to_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    build = shlex.join(build_words(tmp_path, corpus))
    more = ["--build-data", build, "--dependency", "afterok:5"]
    sets = ["evaluation.every_steps=0", "data.path=built", "output_dir=my run"]
    assert main([*on(Path("built")), "--set", "output_dir=my run", "--nodes", "1-2", *ON_CPUS, *more]) == 0
    folder = tmp_path / "my run" / "slurm"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [config_file(load_config("demo_cpu", sets)).name, *SCRIPTS]
    assert f"arguments=({build})" in (folder / "data.sbatch").read_text()
    captured = capsys.readouterr().out.splitlines()
    assert captured == [
        f"sbatch '{folder}/data.sbatch'",
        f"sbatch --dependency=afterok:5,afterok:JOB_ID --kill-on-invalid-dep=yes '{folder}/job.sbatch'",
    ]
    assert dependency_options("9", None)[0] == "--dependency=afterok:9"


def test_a_job_keeps_the_settings_it_was_submitted_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    """run.yaml is changed, submitted again, deleted: every start of each script uses its own configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    file, job = tmp_path / "run.yaml", tmp_path / "run" / "slurm" / "job.sbatch"

    def submitted(rate: float, *more: str) -> str:
        file.write_text(f"base: demo_cpu\noutput_dir: run\noptimizer: {{lr: {rate}}}\n")
        words = ["run.yaml" if word == "demo_cpu" else word for word in on(corpus)]
        assert main([*words, "--nodes", "1", *ON_CPUS, *more]) == 0
        return job.read_text()

    def started(script: str) -> RunConfig:
        words = run_script(script, tmp_path / "bin")
        words = words[words.index("maskvr_ds.train") + 1 : words.index("--resume")]
        return load_config(words[1], words[3::2])

    first, seeds, second = submitted(0.25), submitted(0.25, "--seeds", "3", "4"), submitted(0.5)
    assert submitted(0.25) == first
    file.unlink()
    assert [started(script).optimizer.lr for script in (first, seeds, second)] == [0.25, 0.25, 0.5]
    assert started(first).data.path == corpus
    # The stub of Slurm starts task 1.
    assert (started(seeds).seed, started(seeds).output_dir) == (4, tmp_path / "run" / "seed-4")
    configs = list(job.parent.glob("config-*.yaml"))
    assert len(configs) == 2


def test_a_run_from_the_checkpoint_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "main", 10)
    words = [*on(corpus), "--set", "output_dir=branch", "--nodes", "1", *ON_CPUS]
    job = tmp_path / "branch" / "slurm" / "job.sbatch"
    # A run: its newest checkpoint. Submitted once more, later: the same job, though the run has one of its own.
    for named in ("main", str(source)):
        assert main([*words, "--resume", named]) == 0
        assert f"\nresume={source}\n" in job.read_text()
    write_origin(tmp_path / "branch", source)
    write_checkpoint(tmp_path / "branch", 20)
    assert main([*words, "--resume", str(source), "--container", "image.sif"]) == 0
    assert f"--bind {source}" in job.read_text()
    # Not what it was started from.
    other = write_checkpoint(tmp_path / "main", 15)
    assert main([*words, "--resume", str(other)]) == 1
    assert "branch is not empty, and this is not its newest checkpoint" in capsys.readouterr().err
    assert main([*words, "--resume", "auto"]) == 0
    assert "\nresume=auto\n" in job.read_text()


def test_an_edited_configuration_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*on(corpus), "--set", "output_dir=run", "--nodes", "1", *ON_CPUS]
    assert main(words) == 0
    (path,) = (tmp_path / "run" / "slurm").glob("config-*.yaml")
    path.write_text(path.read_text() + "# mine\n")
    assert main(words) == 1
    assert f"{path}: edited since it was written" in capsys.readouterr().err
    assert path.read_text().endswith("# mine\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *(
            (f"--evaluate-{name}", "no evaluation; add --evaluate ARGUMENTS")
            for name in ("cpus", "gpus", "time", "mem")
        ),
        *(
            (f"--build-{name}", "no build job; add --build-data ARGUMENTS")
            for name in ("cpus", "time", "mem", "partition", "qos")
        ),
    ],
)
def test_options_of_another_job_need_one(
    option: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*on(corpus), "--set", "output_dir=run", "--nodes", "1", *ON_CPUS, option, "1"]
    assert main(words) == 1
    assert f"{option}: there is {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
