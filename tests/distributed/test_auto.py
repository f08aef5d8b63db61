"""masking.strategy auto on real gloo ranks: ranks share one choice, the data order is unaffected, resume is exact, and
costs are measured once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.checkpoint import load
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, read_manifest
from maskvr_ds.run_folder.layout import CHECKPOINTS, MASK_COSTS, METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from maskvr_ds.training.auto_choice import MaskingPlan
from maskvr_ds.training.step_costs import StepCosts
from tests.distributed.ranks import run_ranks
from tests.distributed.training import (
    NO_DROPOUT,
    Life,
    column,
    configuration,
    free_ports,
    live,
    metrics,
    train_all,
)
from tests.support.corpora import make_corpus

STEPS, EVERY = 32, 4
# Best by measurement after 4, 8 … steps, and what is chosen; 60 sequences of 32 tokens at rate 0.2: 5 segments, which
# are shorter than uniform masks where a row has the end of a document. At the end the rate is that of the goal.
ONE, ALL, PROPOSAL = ("uniform", 1, 0.2), ("fully_explored", 5, 0.2), ("mapnet", 1, 0.2)
LAST = ("uniform", 1, 0.15)
MEASURED = [ALL, ALL, PROPOSAL, PROPOSAL, ONE, ONE]
COURSE = [ONE, ALL, ALL, PROPOSAL, PROPOSAL, ONE, LAST]
SLOW = 0.1
# Of the runs late-*: masks of the goal, of two layers and of segments, 2 · 2 of each of 16 rows; limit of measurements.
LATE_PASSES, SHARE = 4 * 2 * 2 * 16, 0.5
EXACT = ("step", "loss", "grad_norm", "data_digest", "mask_digest", "predictions")


def train_by_course(jobs: list[tuple[dict[str, Any], str | None]], strict: bool) -> list[str | None]:
    """On a rank: `train_all` with the measurements replaced by MEASURED. strict: other ranks measure something else."""
    from maskvr_ds.runtime import distributed
    from maskvr_ds.training import mask_costs
    from maskvr_ds.training.auto_choice import MaskingPlan, Rating
    from maskvr_ds.training.auto_strategy import Chooser
    from maskvr_ds.training.step_costs import StepCosts

    def measure(self: Chooser, key: int) -> Any:
        best = MaskingPlan(*MEASURED[asked.pop(0)])
        good = 0.5 if strict and distributed.rank() else 2.0
        ratings = {
            self.plan: Rating((1.0, 1.0, 1.0), 1.0),
            MaskingPlan("fully_explored", 2, 0.2): Rating((3.0, 0.9, 9.0), 1),
        }
        return {best: Rating((good, good, good), 1.0), **ratings}, good, {"passes": 0}

    def costs(config: Any, corpus: Any, needed: Any, here: Any, make_engine: Any) -> StepCosts:
        assert needed.rates == (0.2, 0.15)
        measured.append(config.output_dir)
        return StepCosts(dict.fromkeys(needed.rates, 1.0), dict.fromkeys(needed.strategies, 0.1), dict(here))

    measured: list[Path] = []
    mask_costs.measure_costs = costs
    Chooser._measure = measure  # type: ignore[method-assign]
    answers = []
    for values, resume in jobs:
        done = len(metrics(Path(values["output_dir"]))) if resume else 0
        asked = list(range(done // EVERY, len(MEASURED)))
        answers += train_all([(values, resume)])
        assert len(measured) == len(set(measured)), "a resume does not measure"
    return answers


def train_with_slow_network(jobs: list[tuple[dict[str, Any], str | None]]) -> list[str | None]:
    """On a rank: `train_all` with a MAPNet that takes SLOW CPU-seconds more per step."""
    from maskvr_ds.masking.proposer import Proposer

    observe = Proposer.observe

    def slow(*args: Any) -> None:
        end = time.process_time() + SLOW
        while time.process_time() < end:
            pass
        observe(*args)

    Proposer.observe = slow  # type: ignore[method-assign]
    return train_all(jobs)


class Runs:
    """course-*, parts, elastic: by MEASURED. measured-*: as measured. killed: two kills, and its costs; undisturbed-*:
    with costs at which 0.312 is by far the fastest rate, of the same machine. late-*: with costs at which [MASK] from
    layer 1 is by far faster, one of them killed and resumed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = make_corpus(folder / "corpus", rows=200, words=20, padded_last_row=True)
        self._follow_the_course()
        short = {"training": {"steps": EVERY + 2, "schedule_steps": STEPS}}
        measured = [self.values(f"measured-{ranks}") | short for ranks in (1, 2)]
        faulty = self.values("faulty") | {"masking": {"strategy": "auto", "auto": {"rows": 201}}}
        for ranks in (1, 2):
            stage3 = self.values(f"stage3-{ranks}") | {"deepspeed": "zero3_fp32", **short}
            jobs = [(measured[ranks - 1], None), (faulty, None), *([(stage3, None)] if ranks == 2 else [])]
            answers = run_ranks(train_with_slow_network, ranks, jobs)
            assert [[answer[0], *answer[2:]] for answer in answers] == [[None] * (len(jobs) - 1)] * ranks, answers
            self.refused = [str(answer[1]) for answer in answers]
        self._kill_and_resume()

    def _follow_the_course(self) -> None:
        half = {"steps": 14, "schedule_steps": STEPS}
        parts, elastic = self.values("parts"), self.values("elastic")
        jobs: list[tuple[dict[str, Any], str | None]] = [(self.values("course"), None)]
        jobs += [({**parts, "training": half}, None), (parts, "auto"), ({**elastic, "training": half}, None)]
        assert run_ranks(train_by_course, 2, jobs, True) == [[None] * len(jobs)] * 2
        assert run_ranks(train_by_course, 1, [(elastic, "auto")], False) == [[None]]

    def _kill_and_resume(self) -> None:
        killed = self.falling("killed") | {"checkpoint": {"every_steps": 5}}
        crafted = {}
        for ranks in (1, 2):
            costs = json.loads((self(f"measured-{ranks}") / MASK_COSTS).read_text(encoding="utf-8"))["phases"]["0"]
            costs["uniform"] = [[rate, 1.0 if rate == 0.312 else 5.0] for rate in (0.45, 0.312, 0.2163, 0.15)]
            crafted[ranks] = self.folder / f"costs-{ranks}.json"
            crafted[ranks].write_text(json.dumps(costs), encoding="utf-8")
        given = with_costs(killed, crafted[2])
        lives = [
            Life([(given, None)], kill=("step", 3)),
            # Costs are read from the run's folder now: the setting is gone, which may change on resume.
            Life([(killed, "auto")], kill=("step", 11)),
            Life([(killed, "auto")]),
            Life([(with_costs(self.falling("undisturbed-2"), crafted[2]), None)]),
            Life([(with_costs(self.falling("elsewhere"), crafted[1]), None)]),
        ]
        late = {ranks: self._cheap_layer(costs) for ranks, costs in crafted.items()}
        often = {"checkpoint": {"every_steps": 5}}
        lives += [
            Life([(with_costs(self.late("late-killed"), late[2]) | often, None)], kill=("step", 11)),
            Life([(with_costs(self.late("late-killed"), late[2]) | often, "auto")]),
            Life([(with_costs(self.late("late-2"), late[2]), None)]),
        ]
        answers = run_ranks(live, 2, lives, free_ports(len(lives)))
        expected = ["killed", "killed", [None], [None], "killed", [None], [None]]
        assert [[*answer[:4], *answer[5:]] for answer in answers] == [expected] * 2, answers
        self.elsewhere = [str(answer[4][0]) for answer in answers]
        one = with_costs(self.falling("undisturbed-1"), crafted[1])
        jobs = [(one, None), (with_costs(self.late("late-1"), late[1]), None)]
        assert run_ranks(train_all, 1, jobs) == [[None, None]]

    def _cheap_layer(self, costs: Path) -> Path:
        """Costs of `late`: a step takes a fifth of the seconds with [MASK] from layer 1, and a measurement as long as
        2.9 of these steps."""
        content = json.loads(costs.read_text(encoding="utf-8"))
        content |= {"uniform": [[0.45, 5.0]], "late": [[1, [[0.45, 1.0]]]], "per_pass": 2.9 / LATE_PASSES}
        file = costs.with_name(f"late-{costs.name}")
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    def values(self, name: str, **masking: Any) -> dict[str, Any]:
        return configuration(
            self(name),
            self.corpus,
            steps=STEPS,
            model=NO_DROPOUT,
            masking={
                "strategy": "auto",
                "rate": 0.2,
                "final_rate": 0.15,
                "mapnet": {"hidden": 32, "layers": 1},
                "auto": {"every_steps": EVERY, "max_share": None, "rows": 8, "draws": 2, "sketch_size": 500},
                **masking,
            },
            batch={"global_size": 60, "micro_size": 15},
            evaluation={"every_steps": 0},
        )

    def falling(self, name: str) -> dict[str, Any]:
        """A run of 16 steps, whose rate falls from 0.45."""
        values = self.values(name, rate=0.45)
        values["masking"]["auto"] |= {"rows": 16, "proposal": False}
        return values | {"training": {"steps": 16}}

    def late(self, name: str) -> dict[str, Any]:
        """A run of 16 steps, in which [MASK] may enter at layer 1. Measurements may take half of the seconds."""
        values = self.falling(name)
        del values["masking"]["final_rate"]
        values["masking"] |= {"mask_probability": 1, "random_probability": 0}
        values["masking"]["auto"] |= {"late_layers": [1], "max_share": SHARE}
        return values

    def __call__(self, name: str) -> Path:
        return self.folder / name


def with_costs(values: dict[str, Any], costs: Path) -> dict[str, Any]:
    auto = {**values["masking"]["auto"], "costs": str(costs)}
    return {**values, "masking": {**values["masking"], "auto": auto}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("auto"))


def events(run: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(run / METRICS) if e["event"] == "auto"]


def choices(run: Path) -> list[tuple[int, str, int, float]]:
    return [(e["step"], e["strategy"], e["segments"], e["rate"]) for e in events(run)]


def test_choices_follow_the_measurements_and_are_logged(runs: Runs) -> None:
    expected = [(EVERY * (number + 1), *choice) for number, choice in enumerate(COURSE)]
    for name in ("course", "parts", "elastic"):
        assert choices(runs(name)) == expected, name
    assert "taken if the next measurement agrees" in events(runs("course"))[0]["reason"]
    # From the step after a choice up to the next choice.
    used = [line.get("proposal_used") for line in metrics(runs("course"))]
    assert used == [None] * 4 + [0.0] * 12 + [1.0] * 8 + [0.0] * 4 + [None] * 4
    predictions = [line["predictions"] for line in metrics(runs("course"))]
    assert min(predictions[:28]) > max(predictions[28:])


def test_data_do_not_depend_on_ranks_or_choices(runs: Runs) -> None:
    one, two = (column(runs(name), "step", "samples", "data_digest") for name in ("elastic", "course"))
    assert one == two
    assert len({digest for _, _, digest in one}) == STEPS
    masks = [column(runs(name), "mask_digest") for name in ("elastic", "course")]
    # MAPNet's masks may differ: its training rounds differently.
    assert [m for i, m in enumerate(masks[0]) if not 16 <= i < 24] == [
        m for i, m in enumerate(masks[1]) if not 16 <= i < 24
    ]


def test_resume_is_exact(runs: Runs) -> None:
    """Resumed two steps after the proposal was first measured to be best, while rows are repeated five times."""
    assert column(runs("parts"), *EXACT) == column(runs("course"), *EXACT)


def test_measurements_do_not_depend_on_ranks(runs: Runs) -> None:
    (one,), (two,) = (events(runs(f"measured-{ranks}")) for ranks in (1, 2))
    # Two rates, pairs of segments; MAPNet is not trained yet.
    assert one["passes"] == two["passes"] == 2 * 3 * 8 * 2
    plans = [tuple(each["plan"]) for each in one["candidates"]]
    assert plans == [ONE, LAST, *(("fully_explored", j, 0.2) for j in (2, 3, 4, 5))]
    for mine, other in zip(one["candidates"], two["candidates"], strict=True):
        assert other["progress"] == pytest.approx(mine["progress"], rel=2e-3)
    for name in ("data", "mask"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert one["mask"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_costs_are_measured_before_the_first_step_and_stored(runs: Runs, ranks: int) -> None:
    run = runs(f"measured-{ranks}")
    costs = json.loads((run / MASK_COSTS).read_text(encoding="utf-8"))["phases"]["0"]
    (stored,) = (run / CHECKPOINTS).glob("step-*")
    assert read_manifest(stored)["auto"]["costs"] == costs
    assert [rate for rate, _ in costs["uniform"]] == [0.2, 0.15]
    assert all(seconds > 0 for _, seconds in costs["uniform"])
    assert costs["per_pass"] > 0
    assert set(costs["added"]) == {"fully_explored", "mapnet"}
    assert (costs["machine"]["ranks"], costs["machine"]["global_size"]) == (ranks, 60)
    (event,) = (e for e in read_events(run / METRICS) if e["event"] == "auto_costs")
    assert (event["step"], event["seconds"] > 0) == (0, True)
    # Each candidate's seconds are those of its strategy and rate.
    seconds = {tuple(each["plan"]): each["seconds"] for each in events(run)[0]["candidates"]}
    assert seconds[LAST] == costs["uniform"][1][1]
    assert seconds[ALL] == costs["uniform"][0][1] + costs["added"]["fully_explored"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_mapnet_costs_what_it_takes_and_is_not_trained_until_it_may_pay(runs: Runs, ranks: int) -> None:
    """Its cost is that of the clock, not a share of FLOPs, which a slow network does not change."""
    run = runs(f"measured-{ranks}")
    costs = json.loads((run / MASK_COSTS).read_text(encoding="utf-8"))["phases"]["0"]
    assert costs["added"]["mapnet"] > 0.8 * SLOW
    assert not [key for line in metrics(run)[:EVERY] for key in line if key in ("mapnet_loss", "proposal_cost")]
    (event,) = events(run)
    # Far more than the mask variance that a proposal could remove.
    assert event["best_expected_proposal"] < 1
    assert not event["proposal_trained"]
    assert not [line for line in metrics(run) if "mapnet_loss" in line]


def test_ranks_and_repeats_choose_alike_and_the_rate_falls(runs: Runs) -> None:
    course = choices(runs("undisturbed-2"))
    assert choices(runs("undisturbed-1")) == course
    # The measurements after steps 4 and 8 agree; the last tenth of 16 steps starts after step 14.
    assert [(step, rate) for step, *_, rate in course] == [(4, 0.45), (8, 0.312), (12, 0.312), (14, 0.15)]
    assert "in two measurements" in events(runs("undisturbed-2"))[1]["reason"]
    assert "final_rate 0.15" in events(runs("undisturbed-2"))[3]["reason"]


def test_killed_and_resumed_equals_undisturbed(runs: Runs) -> None:
    """Killed before the first checkpoint, with costs from the run's folder, and after it, with the checkpoint's."""
    assert column(runs("killed"), *EXACT) == column(runs("undisturbed-2"), *EXACT)
    timeless = [
        [{**e, "seconds": None, "cpu_seconds": None} for e in events(runs(name))]
        for name in ("killed", "undisturbed-2")
    ]
    assert timeless[0] == timeless[1]
    assert not [e for e in read_events(runs("killed") / METRICS) if e["event"] == "auto_costs"]


def test_late_masks_are_chosen_equally_and_resumed_exactly(runs: Runs) -> None:
    one, two, killed = (events(runs(f"late-{name}")) for name in ("1", "2", "killed"))
    # Not every 4 steps: a measurement takes as long as 2.9 of the shorter steps, at most half of the steps' seconds.
    assert [(e["step"], e["late_layer"]) for e in two] == [(6, 0), (12, 1), (14, 0)]
    assert [(e["step"], e["late_layer"], e["strategy"]) for e in one] == [
        (e["step"], e["late_layer"], e["strategy"]) for e in two
    ]
    measured = [[e["candidates"] for e in found if e["passes"]] for found in (killed, two)]
    assert measured[0] == measured[1]
    assert column(runs("late-killed"), *EXACT) == column(runs("late-2"), *EXACT)
    ends = [load.read_weights(complete_checkpoints(runs(f"late-{name}"))[-1]) for name in ("killed", "2")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    # The layer changes what is computed, not what is masked: as on one rank, up to rounding.
    assert column(runs("late-1"), "mask_digest") == column(runs("late-2"), "mask_digest")
    losses = [[loss for (loss,) in column(runs(f"late-{ranks}"), "loss")] for ranks in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # Five candidates of one rate; the other layer is one of them.
    assert {tuple(each["plan"][2:]) for each in two[0]["candidates"]} == {(0.45,), (0.45, 1)}


def test_measurements_take_at_most_their_share(runs: Runs) -> None:
    """By the stored costs of the masks of every step, at every measurement; those of the run's events."""
    for name in ("late-1", "late-2", "late-killed"):
        costs = StepCosts.read(json.loads((runs(name) / MASK_COSTS).read_text(encoding="utf-8"))["phases"]["0"])
        assert costs.per_pass is not None
        plan, last, of_steps, of_measurements = MaskingPlan("uniform", 1, 0.45), 0, 0.0, 0.0
        for event in events(runs(name)):
            of_steps += (event["step"] - last) * costs.seconds(plan)
            of_measurements += event["passes"] * costs.per_pass
            assert event["passes"] in (0, LATE_PASSES)
            assert 0 < of_measurements <= SHARE * of_steps
            plan = MaskingPlan(event["strategy"], event["segments"], event["rate"], event["late_layer"])
            last = event["step"]
        assert read_manifest(complete_checkpoints(runs(name))[-1])["auto"]["costs"]["per_pass"] == costs.per_pass


def flops_per_token(run: Path, predictions: int, late: int = 0, hidden: int = 0) -> float:
    """Of a step of these runs' BERT, by the formula: two layers, the lower `late` of which compute `hidden` positions
    less."""
    shapes = {name: tensor.shape for name, tensor in load.read_weights(complete_checkpoints(run)[-1]).items()}
    (V, D), length = shapes["bert.embeddings.word_embeddings.weight"], 32
    inner = shapes["bert.encoder.layer.0.intermediate.dense.weight"][0]
    lengths = [length - hidden] * late + [length] * (2 - late)
    layers = sum(8 * n * D**2 + 4 * n**2 * D + 4 * n * D * inner for n in lengths)
    return 3 * (layers + 2 * predictions * D * (D + V)) / length


@pytest.mark.parametrize("name", ["late-1", "late-2", "late-killed", "undisturbed-1", "killed"])
def test_flops_are_those_of_the_masks_of_every_step(runs: Runs, name: str) -> None:
    """Of 30 positions 14 at rate 0.45, 9 at 0.312 and 5 at 0.15 are predicted; the run was killed at layer 1, and at
    rate 0.312."""
    ranks = 1 if name.endswith("1") else 2
    lines = metrics(runs(name))
    of_ranks = [ranks * 1e12 * line["model_tflops_per_rank"] / line["tokens_per_second"] for line in lines]
    if name.startswith("late"):
        course = [(14, 0, 0)] * 12 + [(14, 1, 14)] * 2 + [(14, 0, 0)] * 2
    else:
        course = [(14, 0, 0)] * 8 + [(9, 0, 0)] * 6 + [(5, 0, 0)] * 2
    expected = [flops_per_token(runs(name), *each) for each in course]
    assert of_ranks == pytest.approx(expected, rel=1e-9)


def test_costs_of_another_machine_and_small_corpora_are_refused(runs: Runs) -> None:
    assert any("measured with ranks 1, this run has 2" in text for text in runs.elsewhere), runs.elsewhere
    assert not (runs("elsewhere") / METRICS).exists()
    assert any("auto.rows 201: " in text and "has only 200 rows" in text for text in runs.refused)
