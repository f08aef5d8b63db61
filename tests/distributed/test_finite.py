"""Nothing that is not finite becomes a checkpoint, and a checkpoint that leads to divergence is not the last resort."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, faults
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, free_ports
from tests.distributed.trajectories import Run
from tests.support.corpora import make_corpus

STEPS, EVERY = 12, 4
# fp16 needs ZeRO, offload too.
RUNS = [
    *(Run(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")),
    *(Run(stage, "fp16", offload=offload) for stage, offload in ((1, False), (2, True), (3, True))),
    Run(3, "fp32", zero={"sub_group_size": 500}),
]


def found_by_nonfinite(run: Run) -> list[tuple[str, int, list[str], list[str]]]:
    """On a rank: (kind, poisoned rank, own tensors that were poisoned, what `nonfinite` names), and the same without
    poison and with poisoned padding."""
    from maskvr_ds.engine.deepspeed_patches import free_memory
    from maskvr_ds.engine.finite import nonfinite
    from maskvr_ds.runtime import distributed
    from tests.distributed import trajectories

    distributed.initialize()
    engine = trajectories.make_engine(run)
    trajectories.train(engine, *(t[0] for t in trajectories.batches(1)), 1.0)
    optimizer = engine.basic_optimizer
    layout = optimizer._layout
    answers = [("nothing", 0, [], nonfinite(engine, {}))]
    for flat, partition in layout.partitions.items():
        padding = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
        for fragment in partition.fragments:
            padding[fragment.partition_start : fragment.partition_start + fragment.length] = False
        flat.detach().view(-1)[padding] = math.nan
    answers.append(("padding", 0, [], nonfinite(engine, {"further": torch.tensor([1e38, -1e38])})))
    for number, kind in enumerate(("weights", "fp32 weights", "exp_avg", "exp_avg_sq")):
        for rank in range(distributed.world_size()):
            poisoned, views = [], []
            for flat, partition in layout.partitions.items():
                # The last fragment: it lies at an end that a wrong layout would miss.
                for fragment in partition.fragments[-1:] if distributed.rank() == rank else []:
                    name = layout.names[fragment.tensor]
                    value = flat.detach() if kind == "fp32 weights" else optimizer.state[flat].get(kind)
                    tensor, of_model = layout.tensors[fragment.tensor], kind == "weights"
                    view = (fragment.of_model(tensor) if of_model else fragment.of_partition(value)).view(-1)
                    views.append((view, view[-1].clone()))
                    view[-1] = (math.nan, math.inf, -math.inf)[(number + rank) % 3]
                    # At stage 0 in fp32 the masters are the model's own weights.
                    plain = of_model or (kind == "fp32 weights" and engine.optimizer is optimizer)
                    poisoned.append(name if plain else f"{kind} of {name}")
            answers.append((kind, rank, poisoned, nonfinite(engine, {})))
            for view, value in views:
                view[-1] = value
    further = {"logits": torch.tensor([0.0, math.nan if distributed.rank() == 1 else 0.0])}
    answers.append(("further", 1, ["logits"] if distributed.rank() == 1 else [], nonfinite(engine, further)))
    engine.destroy()
    free_memory()
    return answers


def found_in_all(runs: list[Run]) -> list[Any]:
    return [found_by_nonfinite(run) for run in runs]


def test_every_value_of_a_partition_is_looked_at_and_no_padding() -> None:
    for run, of_ranks in zip(RUNS, zip(*run_ranks(found_in_all, 2, RUNS), strict=True), strict=True):
        for on_ranks in zip(*of_ranks, strict=True):
            kind, rank, _, found = on_ranks[0]
            assert all(answer[3] == found for answer in on_ranks), "identical on all ranks"
            poisoned = {name for answer in on_ranks for name in answer[2]}
            assert set(found) == poisoned, (str(run), kind, rank)
            assert bool(poisoned) or kind in ("nothing", "padding")


class Trained:
    def __init__(self, folder: Path) -> None:
        self.folder, corpus = folder, make_corpus(folder / "corpus", rows=200, words=20)

        def values(name: str, **sections: Any) -> dict[str, Any]:
            sections = {"evaluation": {"every_steps": 0}, "deepspeed": "zero2_fp32", **sections}
            sections["checkpoint"] = {"every_steps": EVERY, **sections.get("checkpoint", {})}
            return configuration(folder / name, corpus, steps=STEPS, **sections)

        off = {"divergence": {"enabled": False}}
        asynchronous = {"checkpoint": {"asynchronous": True}}
        at = 2 * EVERY
        self.acts = {
            "masters": Act(values("masters"), poison=(at, "masters", 1)),
            "moments": Act(values("moments"), poison=(at, "exp_avg_sq", 0)),
            # Else the comparison of replicas finds the fault first.
            "rounded": Act(values("rounded", replicas={"enabled": False}), poison=(at, "rounded", 0)),
            "stage 3": Act(values("stage 3", deepspeed="zero3_fp32"), poison=(at, "masters", 1)),
            "async": Act(values("async", **asynchronous), poison=(at, "masters", 1)),
            "last step": Act(values("last step"), poison=(STEPS, "exp_avg", 1)),
            "no guard": Act(values("no guard", **off), poison=(at, "masters", 1)),
            "misread": Act(
                values("misread", checkpoint={"asynchronous": True, "keep_last": 2}), misread="step-00000012"
            ),
            # What versions without the check have saved: the newest checkpoint leads to divergence.
            "old": Act(values("old"), poison=(at, "exp_avg", 0), unchecked=True),
            "old killed": Act(values("old killed"), poison=(at, "exp_avg", 0), unchecked=True, kill=(None, "step", at)),
            "old resumed": Act(values("old killed"), "auto"),
        }
        ranks = run_ranks(play, 2, list(self.acts.values()), free_ports(len(self.acts)), timeout=900)
        self.said = {name: [rank[i] for rank in ranks] for i, name in enumerate(self.acts)}

    def rollbacks(self, name: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self.folder / name / METRICS) if e["event"] == "rollback"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("finite"))


@pytest.mark.parametrize(
    ("name", "step", "named"),
    [
        ("masters", 8, "fp32 weights of"),
        ("moments", 8, "exp_avg_sq of"),
        ("rounded", 8, "logits of the probe"),
        ("stage 3", 8, "fp32 weights of"),
        ("async", 8, "fp32 weights of"),
        ("last step", 12, "exp_avg of"),
    ],
)
def test_what_is_not_finite_is_not_saved_and_rolls_back(trained: Trained, name: str, step: int, named: str) -> None:
    assert trained.said[name] == ["done", "done"]
    (event,) = trained.rollbacks(name)
    assert (event["step"], event["to_step"]) == (step, step - EVERY)
    assert event["reason"].startswith("not finite: ")
    assert named in event["reason"]
    folders = complete_checkpoints(trained.folder / name)
    assert [folder.name[-2:] for folder in folders] == ["04", "08", "12"]
    assert [faults(folder) for folder in folders] == [[], [], []]


def test_without_the_guard_the_run_ends_and_keeps_the_good_checkpoint(trained: Trained) -> None:
    for said in trained.said["no guard"]:
        assert said.startswith("FloatingPointError: step 8: not finite: fp32 weights of mlm.")
        assert "not saved" in said
    (folder,) = complete_checkpoints(trained.folder / "no guard")
    assert folder.name == "step-00000004"
    assert not list((trained.folder / "no guard" / "checkpoints").glob(".*"))
    assert all(torch.isfinite(tensor).all() for tensor in read_weights(folder).values())


def test_nothing_is_deleted_before_the_new_checkpoint_was_read_back(trained: Trained) -> None:
    assert any("could not be written and was discarded" in said for said in trained.said["misread"])
    assert any("other bytes are read back than were written" in said for said in trained.said["misread"])
    folders = complete_checkpoints(trained.folder / "misread")
    assert [folder.name[-2:] for folder in folders] == ["04", "08"]
    assert [faults(folder) for folder in folders] == [[], []]


def test_rollbacks_that_fail_go_one_checkpoint_further_back(trained: Trained) -> None:
    assert trained.said["old"] == ["done", "done"]
    assert [event["to_step"] for event in trained.rollbacks("old")] == [8, 8, 8, 4]
    folders = complete_checkpoints(trained.folder / "old")
    assert [folder.name[-2:] for folder in folders] == ["04", "08", "12"]
    assert column(trained.folder / "old", "step") == [(step,) for step in range(1, STEPS + 1)]


def test_a_resume_from_bad_moments_goes_further_back_too(trained: Trained) -> None:
    assert trained.said["old resumed"] == ["done", "done"]
    assert sorted(event["to_step"] for event in trained.rollbacks("old killed")) == [4, 8, 8, 8]
