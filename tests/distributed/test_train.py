"""Training on real gloo ranks: runs do not depend on the ranks, resume is exact, exports equal the trained model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskvr_ds.checkpoint import load
from maskvr_ds.cli import main
from maskvr_ds.run_folder import checkpoints, layout
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import TRUST_RATIOS
from maskvr_ds.telemetry.metrics_file import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.training import (
    NO_DROPOUT,
    column,
    configuration,
    metrics,
    run_and_kill,
    run_command,
    run_deepspeed,
    train_all,
)
from tests.support.corpora import make_corpus

STEPS = 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(folder, rows=200, words=20, padded_last_row=True)
    make_corpus(folder / "held_out", rows=60, words=20, seed=1)
    make_corpus(folder / "second", rows=70, words=20, seed=2)
    make_corpus(folder / "second" / "held_out", rows=20, words=20, seed=3)
    return folder


# Name → changes; all must see the same data and masks and compute the same losses.
# Of 12 sequences per step; the fewer micro-batches, the faster.
LARGE: dict[str, Any] = {"batch": {"micro_size": 6}}
SAME: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": "zero0_fp32", "batch": {"micro_size": 3}},
    "zero1": {"deepspeed": "zero1_fp32", "batch": {"micro_size": 2}},
    "zero2": {"deepspeed": "zero2_fp32", **LARGE},
    "zero2-other-layout": {"deepspeed": "zero2_fp32", "batch": {"micro_size": 2}},
}


@pytest.fixture(scope="module")
def same_runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of SAME on 1, 2 and 3 ranks, a mixture and StableAdamW on 1 and 2, and more on 2: bf16, AdamW."""
    folder = tmp_path_factory.mktemp("same")
    runs = {}
    for world_size in (1, 2, 3):
        names: dict[str, Any] = dict(SAME) if world_size < 3 else {"zero1": SAME["zero1"]}
        if world_size < 3:
            mixture = [{"path": str(corpus), "weight": 0.6}, {"path": str(corpus / "second"), "weight": 2.5}]
            names |= {"mixture": {"data": {"path": None, "mixture": mixture}, **LARGE}}
            names |= {"stable": {"optimizer": {"name": "stable_adamw", "lr": 3e-3}, **LARGE}}
        if world_size == 2:
            names |= {f"bf16-zero{stage}": {"deepspeed": f"zero{stage}_bf16", **LARGE} for stage in (0, 1, 2)}
            names |= {"adamw": {"optimizer": {"name": "adamw", "lr": 3e-3}, **LARGE}}
        jobs = []
        for name, changes in names.items():
            run = folder / f"{name}-{world_size}"
            values = configuration(run, corpus, steps=STEPS, model=NO_DROPOUT, deepspeed="zero1_fp32")
            for section, change in changes.items():
                values[section] = {**values[section], **change} if isinstance(change, dict) else change
            jobs.append((values, None))
            runs[run.name] = run
        outcomes = run_ranks(train_all, world_size, jobs, timeout=900)
        assert outcomes == [[None] * len(jobs)] * world_size
    return runs


def test_digests_do_not_depend_on_ranks_stage_layout_or_precision(same_runs: dict[str, Path]) -> None:
    digests = {
        name: column(run, "step", "samples", "predictions", "lr", "data_digest", "mask_digest")
        for name, run in same_runs.items()
        if not name.startswith(("adamw", "mixture", "stable"))
    }
    reference = digests["zero0-1"]
    assert len(reference) == STEPS
    assert len({d[-1] for d in reference}) == STEPS, "each step has its own masks"
    assert all(found == reference for found in digests.values())


def test_losses_do_not_depend_on_ranks_stage_or_layout(same_runs: dict[str, Path]) -> None:
    reference = metrics(same_runs["zero0-1"])
    for name, run in same_runs.items():
        if name.startswith(("bf16", "adamw", "mixture", "stable")):
            continue
        for expected, found in zip(reference, metrics(run), strict=True):
            for figure in ("loss", "grad_norm", "held_out_loss"):
                if figure in expected:
                    assert found[figure] == pytest.approx(expected[figure], abs=1e-4), (name, figure, found["step"])


def test_a_mixture_of_corpora_does_not_depend_on_ranks(same_runs: dict[str, Path]) -> None:
    """Its epoch has 120 + 175 samples: 50 steps of 12 cover two."""
    runs = [same_runs[name] for name in ("mixture-1", "mixture-2", "zero1-1")]
    one, two, other = (column(run, "samples", "predictions", "data_digest", "mask_digest") for run in runs)
    assert one == two
    assert not {d[2] for d in one} & {d[2] for d in other}
    for expected, found in zip(*map(metrics, runs[:2]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert found.get("held_out_loss") == pytest.approx(expected.get("held_out_loss"), abs=1e-4)


def test_stable_adamw_does_not_depend_on_ranks(same_runs: dict[str, Path]) -> None:
    one, two = (metrics(same_runs[name]) for name in ("stable-1", "stable-2"))
    for figure in ("loss", "grad_norm", "update_rms_max"):
        expected = [line[figure] for line in one]
        assert [line[figure] for line in two] == pytest.approx(expected, rel=1e-3), figure
    assert max(line["update_rms_max"] for line in one) > 1
    assert "update_rms_max" not in metrics(same_runs["zero1-1"])[0]


def test_loss_falls_with_each_optimizer_and_in_bf16(same_runs: dict[str, Path]) -> None:
    for name in ("zero2-2", "bf16-zero0-2", "bf16-zero1-2", "bf16-zero2-2", "adamw-2", "stable-2"):
        held_out = [line["held_out_loss"] for line in metrics(same_runs[name]) if "held_out_loss" in line]
        assert len(held_out) == 5
        assert held_out[-1] < held_out[0] - 0.05, name


@pytest.mark.parametrize("name", ["zero2-2", "zero0-1", "bf16-zero1-2"])
def test_exported_model_matches_the_engine(same_runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForMaskedLM, pipeline

    output = tmp_path / "model"
    words = ["export", "--checkpoint", str(same_runs[name]), "--output", str(output)]
    assert main(words) == 0
    (folder,) = complete_checkpoints(same_runs[name])
    probe = load.read_probe(folder)
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
    model = BertForMaskedLM.from_pretrained(output, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"], attention_mask=probe.get("attention_mask")).logits.float()
    for row, positions in enumerate(probe["positions"]):
        assert torch.allclose(logits[row, positions], probe["logits"][row], atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.mask_token == "[MASK]"
    guesses = pipeline("fill-mask", model=str(output))("w1 w2 [MASK] w4 w5")
    assert len(guesses) == 5
    assert main(words) == 1, "an existing folder is not overwritten"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bf16_checkpoints_hold_master_weights(same_runs: dict[str, Path], stage: int) -> None:
    (folder,) = complete_checkpoints(same_runs[f"bf16-zero{stage}-2"])
    for name, weight in load.read_weights(folder).items():
        assert not torch.equal(weight, weight.bfloat16().float()), f"{name}: only bf16 values"


def test_an_export_that_differs_is_refused(same_runs: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from maskvr_ds.checkpoint import export

    run = tmp_path / "run"
    shutil.copytree(same_runs["zero2-2"], run)
    (folder,) = complete_checkpoints(run)
    weights = load_file(folder / layout.WEIGHTS)
    weights["bert.encoder.layer.0.output.dense.weight"][3, 3] += 0.5
    save_file(weights, folder / layout.WEIGHTS)
    state = checkpoints.read_state(folder)
    (folder / layout.MANIFEST).unlink()
    checkpoints.write_manifest(folder, vars(state))
    with pytest.raises(export.ExportError, match="differ from the engine's"):
        export.export(run, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"], "no partial output"


def test_resume_is_exact(corpus: Path, tmp_path: Path) -> None:
    """40 steps on 2 ranks with dropout, against a job killed after step 20 and resumed: bit-identical.

    The uninterrupted run is launched by `deepspeed --module`, the others by `maskvr train`: these are equivalent.
    """
    values = configuration(tmp_path / "uninterrupted", corpus, steps=40, checkpoint={"every_steps": 10, "keep_last": 2})
    values |= {"deepspeed": "zero2_fp32", "monitor": {"tensorboard": True, "csv": True, "histogram_every": 10}}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    uninterrupted = run_deepspeed("--config", config)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert list((tmp_path / "uninterrupted" / "tensorboard").glob("events.out.tfevents.*")), "TensorBoard"
    assert len((tmp_path / "uninterrupted" / "csv" / "train_loss.csv").read_text().splitlines()) == 41, (
        "CSV: header and steps"
    )
    assert (tmp_path / "uninterrupted" / "loss.png").is_file()

    killed = tmp_path / "killed"
    words = ("train", "--config", config, "--num-gpus", 2, "--set", f"output_dir={killed}")
    run_and_kill(*words, when=lambda: any(p.name == "step-00000020" for p in complete_checkpoints(killed)))
    assert len(metrics(killed)) < 40
    refused = run_ranks(train_all, 2, [({**values, "output_dir": str(killed)}, None)])
    assert "is not empty; add --resume auto" in str(refused[0])
    resumed = run_command(*words, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    figures = ("step", "samples", "loss", "lr", "grad_norm", "data_digest", "mask_digest", "trust_ratio_median")
    assert column(killed, *figures) == column(tmp_path / "uninterrupted", *figures)
    ratios = [read_lines(run / TRUST_RATIOS) for run in (killed, tmp_path / "uninterrupted")]
    assert ratios[0] == ratios[1]
    assert [line["step"] for line in ratios[0]] == [10, 20, 30, 40]
    held_out = [[x.get("held_out_loss") for x in metrics(r)] for r in (killed, tmp_path / "uninterrupted")]
    assert held_out[0] == held_out[1]
    assert [p.name for p in complete_checkpoints(killed)] == ["step-00000030", "step-00000040"], "keep_last"
    weights = [load.read_weights(complete_checkpoints(run)[-1]) for run in (killed, tmp_path / "uninterrupted")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
