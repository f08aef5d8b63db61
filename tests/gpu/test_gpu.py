"""Trainings on one GPU against the same on the CPU: `python -m pytest tests/gpu`; skipped without a GPU.

The other tests compare the CPU's results with independent implementations.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.test_precision import SAVED, STEPS, train_and_resume
from tests.distributed.test_strategies import OTHERS, STRATEGIES
from tests.distributed.test_variance import leaves, measure_all
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DIGESTS = ("step", "samples", "data_digest", "mask_digest")
MASKINGS = OTHERS | STRATEGIES
# Stage 3 last: it replaces torch's `linear` for the rest of the process.
STAGES = [f"zero{stage}_{dtype}" for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16", "fp16")]
ENGINES = [name for name in STAGES if name != "zero0_fp16"] + ["zero2_bf16_offload", "zero3_bf16_offload"]
# Bounds on the loss difference (loss about 3) from fp32 on the CPU, as in tests/distributed/test_precision.py.
BOUNDS = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 6e-4}
MAPNET: dict[str, Any] = {"masking": {"strategy": "mapnet", "rate": 0.2, "mapnet": {"gate": "always"}}}
AUTO: dict[str, Any] = {"masking": {"strategy": "auto", "rate": 0.2, "auto": {"every_steps": 2, "max_share": None}}}


def values(folder: Path, name: str, accelerator: str, **sections: Any) -> dict[str, Any]:
    return configuration(
        folder / accelerator / name,
        folder / "corpus",
        steps=STEPS,
        **{
            "model": NO_DROPOUT,
            "batch": {"global_size": 120, "micro_size": 40},
            "optimizer": {"name": "lamb", "lr": 0.01},
            "evaluation": {"every_steps": STEPS, "rows": 60},
            "checkpoint": {"every_steps": SAVED},
            "deepspeed": "zero1_fp32",
            **sections,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the GPU runs in cuda/ and the CPU runs in cpu/."""
    folder = tmp_path_factory.mktemp("gpu")
    make_corpus(folder / "corpus", rows=200, words=20, padded_last_row=True)
    make_corpus(folder / "corpus" / "held_out", rows=60, words=20, seed=1)
    for accelerator in ("cpu", "cuda"):
        jobs = [
            values(folder, name, accelerator, masking={"rate": 0.2, **masking}) for name, masking in MASKINGS.items()
        ]
        jobs += [values(folder, name, accelerator, **more) for name, more in (("mapnet", MAPNET), ("auto", AUTO))]
        if accelerator == "cuda":
            more = {"masking": {"rate": 0.2}, "evaluation": {"every_steps": 0}}
            jobs += [values(folder, engine, accelerator, deepspeed=engine, **more) for engine in ENGINES]
        outcomes = run_ranks(train_all, 1, [(job, None) for job in jobs], timeout=600, accelerator=accelerator)
        assert outcomes == [[None] * len(jobs)]
    return folder


def difference(folder: Path, name: str, reference: str) -> float:
    ours, theirs = (torch.tensor(column(run, "loss")) for run in (folder / "cuda" / name, folder / "cpu" / reference))
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", MASKINGS)
def test_masks_equal_those_of_a_cpu(folder: Path, name: str) -> None:
    assert column(folder / "cuda" / name, *DIGESTS) == column(folder / "cpu" / name, *DIGESTS)
    assert difference(folder, name, name) < BOUNDS["fp32"]


@pytest.mark.parametrize("engine", ENGINES)
def test_stages_precisions_and_offload(folder: Path, engine: str) -> None:
    assert column(folder / "cuda" / engine, *DIGESTS) == column(folder / "cpu" / "uniform", *DIGESTS)
    assert difference(folder, engine, "uniform") < BOUNDS[engine.split("_")[1]]


@pytest.mark.parametrize("name", ["mapnet", "auto"])
def test_strategies_that_measure_gradients(folder: Path, name: str) -> None:
    """Their masks depend on floating-point numbers, which differ in the last digits."""
    lines, theirs = metrics(folder / "cuda" / name), metrics(folder / "cpu" / name)
    assert len(lines) == len(theirs) == STEPS
    assert lines[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-4)
    assert difference(folder, name, name) < 0.1
    if name == "mapnet":
        for figure in ("gradient_norm_mean", "effective_sample_size"):
            assert lines[0][figure] == pytest.approx(theirs[0][figure], rel=1e-3), figure


@pytest.mark.parametrize(("engine", "how"), [("zero1_bf16", "none"), ("zero3_bf16", "none"), ("zero1_bf16", "layers")])
def test_resume_differs_no_more_than_a_repetition(folder: Path, engine: str, how: str) -> None:
    more: dict[str, Any] = {**MAPNET, "model": {}, "deepspeed": engine, "training": {"compile": how}}
    more["optimizer"] = {"name": "lamb", "lr": 0.01, "fused": how == "layers"}
    runs = [values(folder, f"{engine}-{how}-{name}", "cuda", **more) for name in ("uninterrupted", "again")]
    outcome = run_ranks(train_and_resume, 1, runs[:1], True, [(runs[1], None)], timeout=300, accelerator="cuda")
    assert outcome == [[None] * 3]
    uninterrupted, again = (Path(run["output_dir"]) for run in runs)
    resumed = uninterrupted.with_name(uninterrupted.name + "-resumed")
    assert column(uninterrupted, "step", "samples", "data_digest") == column(resumed, "step", "samples", "data_digest")
    # A GPU sums in no fixed order: the difference of two uninterrupted runs is the yardstick.
    assert [p.name for p in complete_checkpoints(resumed)] == [p.name for p in complete_checkpoints(uninterrupted)]
    apart = [
        torch.tensor(column(run, "loss")) - torch.tensor(column(uninterrupted, "loss")) for run in (resumed, again)
    ]
    most = [each.abs().max().item() for each in apart]
    print(f"{engine}, {how}: difference of a resumed run {most[0]:.3g}, of a repeated one {most[1]:.3g}")
    assert most[0] <= max(1e-3, 3 * most[1])


def test_variance(folder: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(folder / "cpu" / "mapnet"), "--corpus", str(folder / "corpus"), "--sequences", "8"]
    options += ["--masks", "3", "--sketch-size", "500", "--oracle-rounds", "1", "--hamming-rounds", "2"]
    options += ["--strategies", "uninterrupted_word", "frequency", "oracle_gradient", "oracle_head:floor=0.2"]
    reports = []
    for accelerator in ("cpu", "cuda"):
        output = tmp_path / accelerator
        run_ranks(measure_all, 1, [[*options, "--output", str(output)]], timeout=300, accelerator=accelerator)
        reports.append(leaves(json.loads((output / "variance.json").read_text())["strategies"]))
    assert len(reports[0]) > 300
    for path, value in reports[0].items():
        if not path.endswith(("/seconds", "/bytes", "/memory")):
            assert reports[1][path] == pytest.approx(value, rel=1e-2, abs=1e-6), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_extremes_propagate_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    """On which the check before every checkpoint relies; in each place of a block, and across blocks."""
    from maskvr_ds.engine.finite import _is_finite

    for size in (1, 1000, 3_000_000):
        for place in (0, size // 2, size - 1):
            tensors = [torch.full((size,), 6e4, dtype=dtype, device="cuda") for _ in range(3)]
            tensors[1][place] = value
            assert bool(_is_finite(tensors)) == (value == 0.0), (size, place)


def test_fused_lamb_on_the_gpu() -> None:
    """Compiled kernels against the list operations, over tensors of one to several blocks; twice the same bits."""
    from maskvr_ds.lamb import Lamb

    def run(*, fused: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        random = torch.Generator("cuda").manual_seed(0)
        shapes = [(30_522, 768), (768, 3072), (4096,), (768,), (7,)]
        weights = [torch.nn.Parameter(0.02 * torch.randn(s, device="cuda", generator=random)) for s in shapes]
        groups = [{"params": weights[:2], "weight_decay": 0.01}, {"params": weights[2:], "weight_decay": 0.0}]
        optimizer = Lamb(groups, lr=4e-3, fused=fused)
        for _ in range(10):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, device="cuda", generator=random)
            optimizer.step()
        return [weight.detach() for weight in weights], optimizer.trust_ratios

    theirs, (ours, ratios), again = run(fused=False), run(fused=True), run(fused=True)
    for our, their, repeated in zip(ours, theirs[0], again[0], strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=2e-6)
        assert torch.equal(our, repeated)
    torch.testing.assert_close(ratios, theirs[1], rtol=1e-4, atol=0)


def bf16_copies(steps: int) -> list[bool]:
    """On a rank: whether, after training, the model's weights in bf16 are the fp32 masters rounded to nearest."""
    from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
    from maskvr_ds.config.deepspeed import read_deepspeed_config
    from maskvr_ds.engine.engine import create_engine, step_and_norm
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed
    from tests.support.batches import random_masked

    distributed.initialize()
    model = ModelConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, max_position_embeddings=32)
    engine = create_engine(
        transformers_config(model, vocab_size=3_000, pad_id=0),
        read_deepspeed_config(deepspeed_config_path("zero1_bf16")),
        model=model,
        batch=BatchConfig(global_size=4, micro_size=4),
        optimizer=OptimizerConfig(lr=0.01, fused=True, gradient_clipping=0.05),
        accumulation=1,
        seed=0,
    )
    engine.train()
    for step in range(steps):
        batch = random_masked(step, rows=4, length=32, predictions=5, vocabulary=3_000)
        engine.backward(weighted_loss(engine, batch.map(lambda t: t.to(distributed.device()))) / 20)
        step_and_norm(engine)
    return [torch.equal(copy, masters.bfloat16()) for masters, copy in engine.basic_optimizer.copies.items()]


def test_fused_lamb_writes_the_weights_of_the_model() -> None:
    assert run_ranks(bf16_copies, 1, 5, accelerator="cuda") == [[True, True]]


def test_micro_size_auto_fits_and_is_stored(folder: Path, tmp_path: Path) -> None:
    """The number that is found is in config.yaml, divides the global batch, and trains."""
    batch = {"global_size": 256, "micro_size": "auto"}
    job = configuration(
        tmp_path / "run",
        folder / "corpus",
        steps=2,
        batch=batch,
        deepspeed="zero1_bf16",
        schedule={"warmup_steps": 1},
        evaluation={"every_steps": 0},
    )
    assert run_ranks(train_all, 1, [(job, None)], accelerator="cuda") == [[None]]
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["batch"]
    # A tiny model: everything fits.
    assert stored == {"global_size": 256, "micro_size": 256}
