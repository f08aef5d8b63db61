"""Batch and population normalisation in training: 1 to 3 ranks, resume, what is refused."""

from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.checkpoint.export import export
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import CheckpointError
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, configuration, train_all
from tests.support.corpora import make_corpus

STEPS = 5
KINDS: dict[str, dict[str, Any]] = {
    "batch": {"normalization": "batch"},
    "population": {"normalization": "population", "gamma_decay": 0.01},
    "rms": {"normalization": "rms"},
}


def values(folder: Path, kind: str, ranks: int, steps: int = STEPS, **sections: Any) -> dict[str, Any]:
    more = {
        "model": {**NO_DROPOUT, **KINDS[kind], **sections.pop("model", {})},
        "batch": {"global_size": 12, "micro_size": 12 // ranks},
        "evaluation": {"every_steps": 1, "rows": 20},
        "checkpoint": {"every_steps": 2, "keep_last": 3},
        # A large ε: what shifts all positions has no gradient before a batch normalisation, and Adam would scale up its
        # rounding errors, which differ by the number of ranks.
        "optimizer": {"name": "adamw", "lr": 2e-3, "eps": 1e-5},
        **sections,
    }
    found = configuration(folder, folder.parent / "corpus", steps=steps, **more)
    found["training"] = {"steps": steps, "schedule_steps": STEPS}
    return found


def losses(folder: Path) -> list[float]:
    """Training and held-out losses."""
    return [line[key] for line in read_lines(folder / METRICS) for key in ("loss", "held_out_loss")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND-RANKS of each kind on 1 to 3 ranks; `resumed`, batch on two ranks, stopped after two steps."""
    folder = tmp_path_factory.mktemp("normalization")
    for name, rows in (("corpus", 36), ("corpus/held_out", 24)):
        make_corpus(folder / name, rows=rows, length=16, padded_last_row=True)
    for ranks in (1, 2, 3):
        kinds = KINDS if ranks < 3 else ("batch", "population")
        jobs = [(values(folder / f"{kind}-{ranks}", kind, ranks), None) for kind in kinds]
        if ranks == 2:
            resumed = folder / "resumed"
            jobs += [(values(resumed, "batch", 2, steps=2), None), (values(resumed, "batch", 2), "auto")]
            jobs += [(values(folder / "elsewhere", "population", 2, steps=2), None)]
        if ranks == 3:
            jobs += [(values(folder / "elsewhere", "population", 3), "auto")]
        assert run_ranks(train_all, ranks, jobs) == [[None] * len(jobs)] * ranks
    return folder


@pytest.mark.parametrize("kind", ["batch", "population"])
def test_ranks_do_not_matter(runs: Path, kind: str) -> None:
    one, two, three = (losses(runs / f"{kind}-{ranks}") for ranks in (1, 2, 3))
    assert len(one) == 2 * STEPS
    assert one == pytest.approx(two, rel=1e-5)
    assert one == pytest.approx(three, rel=1e-5)


def test_normalisations_differ(runs: Path) -> None:
    found = {kind: losses(runs / f"{kind}-1")[-2] for kind in KINDS}
    assert len({round(loss, 4) for loss in found.values()}) == 3


def test_resumed_to_the_bit(runs: Path) -> None:
    """The running statistics are stored: held-out losses depend on nothing else that a resume could lose."""
    assert losses(runs / "resumed") == losses(runs / "batch-2")


def test_resumed_on_another_number_of_ranks(runs: Path) -> None:
    assert losses(runs / "elsewhere") == pytest.approx(losses(runs / "population-3"), rel=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_export_is_refused_by_name(runs: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"was trained with model.normalization {kind}, which no architecture"):
        export(runs / f"{kind}-1", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_refused(runs: Path) -> None:
    copy = runs / "batch-1"
    assert checkpoints.complete_checkpoints(copy)
    jobs = [
        (values(runs / "a", "batch", 1, deepspeed="zero3_fp32"), None, "deepspeed says ZeRO 3; choose fp32"),
        (values(runs / "b", "batch", 1, deepspeed="zero1_bf16"), None, "deepspeed says bfloat16; choose fp32"),
        (values(runs / "c", "batch", 2), None, "each rank takes it in 2 micro-batches; set batch.micro_size"),
        (values(copy, "rms", 1), "auto", "model.normalization was 'batch', is 'rms'"),
    ]
    (found,) = run_ranks(train_all, 1, [job[:2] for job in jobs])
    for error, (_, _, said) in zip(found, jobs, strict=True):
        assert error is not None
        assert said in error


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"compile": "layers"}}, "training.compile is layers, and the statistics are summed over ranks"),
        ({"data": {"attention": "documents"}}, "data.attention is documents, and padding is not marked there"),
        ({"batch": {"micro_size": "auto"}}, "batch.micro_size auto would change the training"),
        ({"masking": {"strategy": "auto"}}, "masking.strategy auto measures gradients of single rows"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    from maskvr_ds.config import RunConfig

    found = values(tmp_path / "run", "batch", 1)
    for name, section in sections.items():
        found[name] = {**found.get(name, {}), **section}
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate(found)
