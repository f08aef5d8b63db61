"""Corpora of a job: errors of the training are found before submission; containers get the inputs of a build."""

import dataclasses
import itertools
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.__main__ import main
from cluster.slurm.corpora import Build, check_corpora, check_initial_model, parse_build
from cluster.slurm.script import SlurmError
from data_pipeline.__main__ import main as pipeline
from data_pipeline.manifest import read_manifest
from maskvr_ds.config import ConfigError, ModelConfig, load_config
from maskvr_ds.training.references import open_corpora
from tests.support.corpora import make_corpus
from tests.support.scripts import build_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora: good, with a held-out split; short, of another sequence length; other, of another tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    make_corpus(folder / "good", rows=10, words=10)
    make_corpus(folder / "good" / "held_out", rows=10, words=10)
    make_corpus(folder / "short", rows=10, words=10, length=16)
    make_corpus(folder / "other", rows=10, words=20)
    return folder


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"data.path": "none"},
            r"none: no corpus there \(manifest.json is missing\); correct the path, build it first",
        ),
        ({"data.path": "short"}, r"short/held_out: no held-out corpus there .*; build it with --held-out"),
        ({"data.held_out_path": "none"}, "none: no corpus there"),
        ({"data.held_out_path": "short"}, "short: sequences of 16 tokens, those of .*good have 32"),
        ({"data.held_out_path": "other"}, "other: tokenizer .* differs from .* of .*good"),
        ({"model.max_position_embeddings": 16}, "sequences of 32 tokens exceed model.max_position_embeddings 16"),
    ],
)
def test_rejects_the_same_corpora_as_training(folder: Path, sets: dict[str, object], message: str) -> None:
    """Compared with the checks of the training, which need torch and the shards."""

    def configured(sets: dict[str, object]) -> list[str]:
        values = {"data.path": "good", **sets}
        return [f"{key}={folder / str(v) if key.startswith('data.') else v}" for key, v in values.items()]

    good = load_config("demo_cpu", configured({}))
    check_corpora(good)
    open_corpora(good)
    bad = load_config("demo_cpu", configured(sets))
    with pytest.raises(ConfigError, match=message):
        check_corpora(bad)
    with pytest.raises(ValueError, match=r"."):
        open_corpora(bad)
    check_corpora(load_config("demo_cpu", [*configured({"data.held_out_path": "none"}), "evaluation.every_steps=0"]))


@pytest.mark.parametrize("built", [False, True])
def test_rows_as_long_as_the_architecture_reads(tmp_path: Path, built: bool) -> None:
    """ModernBERT has no table of 512 positions; RoBERTa counts its own from pad_token_id + 1."""
    make_corpus(tmp_path / "corpus", rows=10, words=10, length=600)
    values = [f"output_dir={tmp_path}/run", f"data.path={tmp_path}/corpus", "evaluation.every_steps=0"]
    build = Build((), tmp_path / "corpus", (), 600, held_out=False) if built else None

    def check(model: str) -> None:
        check_corpora(load_config("modernbert_domain", [*values, "data.attention=rows", f"model={model}"]), build)

    check("{preset: modernbert-base}")
    check("{preset: roberta-base, settings: {max_position_embeddings: 601}}")
    with pytest.raises(ConfigError, match=r"600 tokens exceed model.max_position_embeddings 514"):
        check("{preset: roberta-base}")
    if not built:
        with pytest.raises(ConfigError, match=r"embeddings 600, of which roberta uses 599 .* --sequence-length 599 or"):
            check("{preset: roberta-base, settings: {max_position_embeddings: 600}}")


def test_phases_and_mixtures(folder: Path) -> None:
    def check(*corpora: str) -> None:
        phases = [
            {"name": f"p{i}", "data": {"path": str(folder / name)}, "training": {"steps": 5}}
            | ({"start": {"moments": "keep", "step_counter": "keep", "schedule": "restart"}} if i else {})
            for i, name in enumerate(corpora)
        ]
        file = folder / "run.yaml"
        values = {"output_dir": "run", "phases": phases, "evaluation": {"every_steps": 0}}
        file.write_text(yaml.safe_dump(values))
        check_corpora(load_config(file))

    check("good", "short")
    with pytest.raises(ConfigError, match=r"^phase 'p1': .*other: tokenizer"):
        check("good", "other")
    with pytest.raises(ConfigError, match=r"^phase 'p1': .*none: no corpus there"):
        check("good", "none")
    mixture = yaml.safe_dump([{"path": str(folder / name)} for name in ("good", "short")], default_flow_style=True)
    sets = ["data.path=null", f"data.mixture={mixture}", "evaluation.every_steps=0"]
    with pytest.raises(ConfigError, match="short: sequences of 16 tokens"):
        check_corpora(load_config("demo_cpu", sets))


def test_corpus_that_will_be_built(folder: Path, tmp_path: Path) -> None:
    words = build_words(tmp_path, folder / "good")
    build = parse_build(shlex.join(words))
    assert build == Build(
        words=tuple(words),
        output=tmp_path / "built",
        inputs=(folder / "good" / "tokenizer", tmp_path / "my texts"),
        sequence_length=32,
        held_out=False,
    )
    sets = [f"data.path={tmp_path}/built"]
    without = load_config("demo_cpu", [*sets, "evaluation.every_steps=0"])
    check_corpora(without, build)
    with pytest.raises(ConfigError, match="no corpus there"):
        check_corpora(without)
    with pytest.raises(ConfigError, match="--build-data creates no held-out corpus; add --held-out"):
        check_corpora(load_config("demo_cpu", sets), build)
    check_corpora(load_config("demo_cpu", sets), dataclasses.replace(build, held_out=True))
    with pytest.raises(ConfigError, match="sequences of 1024 tokens exceed"):
        check_corpora(without, dataclasses.replace(build, sequence_length=1024))
    assert read_manifest(folder / "good").sequence_length == 32


def test_inputs_of_a_build(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts" / "wiki").mkdir(parents=True)
    for name in ("texts/wiki/a.txt", "texts/b.txt", "task.txt"):
        (tmp_path / name).write_text("w1\n")
    (tmp_path / "corpus.yaml").write_text(
        yaml.safe_dump(
            {
                "sources": [
                    {"name": "a", "inputs": ["texts/*/*.txt"]},
                    {"name": "b", "inputs": ["texts/../texts/b.txt"]},
                ],
                "documents": {"decontaminate": ["task.txt"]},
            }
        )
    )
    rest = f"--tokenizer {folder}/good/tokenizer --sequence-length 32 --output corpus"
    reads = parse_build(f"--description {tmp_path}/corpus.yaml {rest}").inputs
    named = ["corpus.yaml", "texts", "texts/b.txt", "task.txt"]
    assert reads == (folder / "good" / "tokenizer", *(tmp_path / name for name in named))
    for wrong in (f"--input {tmp_path}/none", f"--input '{tmp_path}/texts/*.jsonl'"):
        with pytest.raises(SlurmError, match="no such file or folder"):
            parse_build(f"{wrong} {rest}")
    with pytest.raises(SlurmError, match="'x': expected an integer"):
        parse_build(f"--input {tmp_path} {rest} --workers x")


def test_a_tokenizer_that_is_not_the_initial_models(folder: Path, tmp_path: Path) -> None:
    build = parse_build(shlex.join(build_words(tmp_path, folder / "good")))
    model = tmp_path / "model"
    shutil.copytree(folder / "good" / "tokenizer", model)
    (model / "config.json").write_text('{"model_type": "modernbert"}')
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        check_initial_model(ModelConfig(initialize_from=model), build)
    (model / "model.safetensors").touch()
    check_initial_model(ModelConfig(initialize_from=model), build)
    shutil.copy(folder / "other" / "tokenizer" / "tokenizer.json", model)
    with pytest.raises(ConfigError, match=rf"token ids of .*tokenizer differ from .* --tokenizer {model}, or set"):
        check_initial_model(ModelConfig(initialize_from=model), build)
    check_initial_model(ModelConfig(initialize_from=model, vocabulary="match"), build)


def test_a_tokenizer_by_its_name_on_a_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job gets the folder, and its container what the links in there lead to."""
    model = tmp_path / "hub" / "models--lab--bert"
    snapshot = model / "snapshots" / ("0" * 40)
    shutil.copytree(folder / "good" / "tokenizer", snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(snapshot))
    monkeypatch.chdir(tmp_path)
    words = build_words(tmp_path, folder / "good")
    words[words.index("--tokenizer") + 1] = "lab/bert"
    words += ["--held-out", "0.5"]
    build = parse_build(shlex.join(words))
    assert build.words == (*words, "--tokenizer", str(snapshot))
    assert build.inputs[0] == snapshot
    options = ["--nodes", "1", "--gpus-per-node", "1", "--container", "i.sif", "--build-data", shlex.join(words)]
    sets = ["--set", f"data.path={tmp_path}/built", "--set", f"output_dir={tmp_path}/run"]
    assert main(["slurm", "--config", "demo_cpu", *options, *sets]) == 0
    assert str(model) in binds(tmp_path / "run" / "slurm" / "data.sbatch")


@pytest.mark.parametrize("described", [False, True])
def test_output_folder_of_another_build_is_rejected(folder: Path, tmp_path: Path, described: bool) -> None:
    """Compared with the build itself: its own output is accepted, started or finished; what it rejects is not."""
    words = build_words(tmp_path, folder / "good")
    if described:
        source = {"name": "a", "inputs": [str(tmp_path / "my texts")]}
        (tmp_path / "corpus.yaml").write_text(yaml.safe_dump({"sources": [source]}))
        words[:2] = ["--description", str(tmp_path / "corpus.yaml")]
    words += ["--packing", "sop", "--columns", "word_start", "--held-out", "0.1", "--held-out-by", "file"]
    output = tmp_path / "built"
    for name in "ac":
        (tmp_path / "my texts" / f"{name}.txt").write_text("w1 w2 w3. w4 w5.\n" * 20)
    output.mkdir()
    parse_build(shlex.join(words))
    assert not list(output.iterdir()), "asking leaves nothing there"
    assert pipeline(["build", *words]) == 0
    before = sorted(output.rglob("*"))
    parse_build(shlex.join(words))
    (output / "manifest.json").rename(tmp_path / "manifest.json")
    parse_build(shlex.join(words))
    for change, what in (
        (["--seed", "5"], "seed was 0, is now 5"),
        (["--packing", "nsp"], "packing was sop, is now nsp"),
        (["--held-out-by", "document"], "held_out_by was file, is now document"),
    ):
        with pytest.raises(SlurmError, match=rf"^--build-data: .*built: .* with other arguments: {what}"):
            parse_build(shlex.join([*words, *change]))
    (tmp_path / "my texts" / "b.txt").write_text("w3\n")
    with pytest.raises(SlurmError, match="sources"):
        parse_build(shlex.join(words))
    (tmp_path / "manifest.json").rename(output / "manifest.json")
    assert sorted(output.rglob("*")) == before


def binds(script: Path) -> list[str]:
    (line,) = (line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("python=("))
    words = shlex.split(line.removeprefix("python=(").removesuffix(")"))
    return [value for name, value in itertools.pairwise(words) if name == "--bind"]


def test_container_binds_existing_paths_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Apptainer fails if a path to bind is missing, as a corpus is before its build."""
    work, jobs, texts = tmp_path / "work", tmp_path / "run" / "slurm", tmp_path / "elsewhere"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "own.json").write_text("{}")
    # As created in a container: its Python does not exist here.
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/no/such/python3")
    build = build_words(texts, folder / "good")
    build[-1] = str(tmp_path / "new" / "built")
    words = ["slurm", "--config", "demo_cpu", "--nodes", "1", "--gpus-per-node", "1", "--container", "i.sif"]
    words += ["--venv", str(tmp_path / "venv"), "--build-data", shlex.join(build)]
    # Not needed: the run does not evaluate.
    sets = {"data.path": build[-1], "data.held_out_path": tmp_path / "none", "evaluation.every_steps": 0}
    sets |= {"output_dir": tmp_path / "run", "deepspeed": tmp_path / "own.json"}
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    assert main(words) == 1
    assert f"{tmp_path}/new: no such folder" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    assert main(words) == 0
    tokenizer, venv = str(folder / "good" / "tokenizer"), str(tmp_path / "venv")
    assert binds(jobs / "data.sbatch") == [
        str(work),
        str(tmp_path / "new"),
        tokenizer,
        str(texts / "my texts"),
        venv,
    ]
    assert binds(jobs / "job.sbatch") == [str(work), str(tmp_path / "run"), build[-1], f"{tmp_path}/own.json", venv]
