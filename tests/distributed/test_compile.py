"""Training with compiled layers or a compiled encoder: the losses of eager mode, exact resume, no later compilation.

By default compiled layers of BERT in fp32 under MAPNet's observer; `--whole-matrix` adds bf16, ModernBERT, the complete
encoder, stages, padded rows and two ranks.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, Life, configuration, free_ports, live, metrics
from tests.support import architectures
from tests.support.corpora import make_corpus

STEPS = 20
# Relative difference of losses to eager mode.
BOUNDS = {"fp32": 1e-5, "bf16": 1e-3}
# Architecture, what is compiled, DeepSpeed configuration, strategy, padded rows.
Case = tuple[str, str, str, str, bool]
DEFAULT: list[Case] = [("bert", "layers", "zero1_fp32", "mapnet", False)]
WHOLE: list[Case] = [
    *product(("bert", "modernbert"), ("layers", "model"), ("zero1_fp32", "zero1_bf16"), ("uniform",), (True,)),
    ("bert", "layers", "zero2_bf16", "mapnet", False),
    ("bert", "model", "zero1_fp32", "mapnet", False),
    ("bert", "model", "zero1_bf16", "mapnet", False),
    ("modernbert", "model", "zero2_fp32", "mapnet", False),
]


def train_without_recompilation(jobs: list[dict[str, Any]]) -> list[int]:
    """On a rank: train each configuration; any compilation in a step is an error. Returns the graphs of each."""
    import torch
    from torch._dynamo.utils import counters

    from maskvr_ds import train
    from maskvr_ds.config import RunConfig
    from maskvr_ds.runtime import distributed
    from maskvr_ds.training import setup

    distributed.initialize()
    generate, graphs = setup._compile, []

    def generate_once(*args: Any) -> None:
        generate(*args)
        torch.compiler.set_stance("fail_on_recompile")

    setup._compile = generate_once
    for values in jobs:
        torch.compiler.set_stance("default")
        counters.clear()
        train.train(RunConfig.model_validate(values))
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def of_case(tmp_path: Path, corpus: Path, case: Case, how: str) -> dict[str, Any]:
    architecture, _, deepspeed, strategy, _ = case
    model = NO_DROPOUT if architecture == "bert" else architectures.section(architecture)
    values = configuration(
        tmp_path / f"{'-'.join(map(str, case))}-{how}",
        corpus,
        steps=STEPS,
        optimizer={"lr": 2e-3},
        masking={"strategy": strategy},
        deepspeed=deepspeed,
        checkpoint={"every_steps": 10},
        training={"compile": how},
    )
    # Replaces the section: sizes of a preset and those of another architecture exclude each other.
    return {**values, "model": model if architecture != "bert" else values["model"] | model}


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_are_those_of_eager_mode(tmp_path: Path, world_size: int, request: pytest.FixtureRequest) -> None:
    cases = WHOLE if request.config.getoption("--whole-matrix") else DEFAULT
    if world_size == 2:
        # The ranks compile by themselves: what differs is the reduction, which is the same for all.
        cases = [case for case in cases if case[3] == "mapnet"] if cases is WHOLE else []
    if not cases:
        pytest.skip("two ranks: --whole-matrix")
    corpora = {p: make_corpus(tmp_path / f"corpus-{p}", rows=200, padded_last_row=p) for p in (False, True)}
    for padded, corpus in corpora.items():
        make_corpus(corpus / "held_out", rows=51, seed=1, padded_last_row=padded)
    jobs = [of_case(tmp_path, corpora[case[-1]], case, how) for case in cases for how in ("none", case[1])]
    graphs = run_ranks(train_without_recompilation, world_size, jobs, timeout=3600)[0]
    for number, case in enumerate(cases):
        eager, compiled = (metrics(Path(values["output_dir"])) for values in jobs[2 * number : 2 * number + 2])
        losses = [[line["loss"] for line in lines] for lines in (eager, compiled)]
        difference = max(abs(ours / theirs - 1) for theirs, ours in zip(*losses, strict=True))
        print(f"{case}, {world_size} ranks: {difference:.2g} relative, {graphs[2 * number + 1]} graphs")
        assert difference <= BOUNDS[case[2].rpartition("_")[2]], case
        assert (len(losses[0]), graphs[2 * number]) == (STEPS, 0)
        # Kinds of layers (of the complete encoder: one), and the head; all but the head twice if rows are padded.
        kinds = 3 if case[:2] == ("modernbert", "layers") else 1
        assert graphs[2 * number + 1] <= kinds * (1 + case[-1]) + 1, case
        for key in ("gradient_norm_mean",) if case[3] == "mapnet" else ():
            figures = [[line[key] for line in lines] for lines in (eager, compiled)]
            assert figures[1] == pytest.approx(figures[0], rel=30 * BOUNDS[case[2].rpartition("_")[2]])


def test_all_stages_of_the_rate_are_compiled_before_the_first_step(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Heads of six widths; with late mask tokens, lower layers of six lengths."""
    if not request.config.getoption("--whole-matrix"):
        pytest.skip("--whole-matrix")
    corpus = make_corpus(tmp_path / "corpus", rows=200)
    late = {"mask_probability": 1, "random_probability": 0, "late_layer": 1}
    jobs = []
    for name, masking in (("plain", {}), ("late", late)):
        for how in ("none", "layers"):
            values = of_case(tmp_path, corpus, ("bert", name, "zero1_fp32", "uniform", False), how)
            jobs.append({**values, "masking": {"rate": 0.45, "final_rate": 0.15, **masking}})
    jobs = [{**values, "evaluation": {"every_steps": 0}} for values in jobs]
    graphs = run_ranks(train_without_recompilation, 1, jobs, timeout=3600)[0]
    assert graphs == [0, 1 + 6, 0, 1 + 6 + 6]
    for eager, compiled in (jobs[:2], jobs[2:]):
        losses = [[line["loss"] for line in metrics(Path(values["output_dir"]))] for values in (eager, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=BOUNDS["fp32"])


def test_killed_and_resumed_is_equal_to_the_bit(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With dropout, whose random numbers are drawn inside of the compiled region."""
    whole = request.config.getoption("--whole-matrix")
    corpus = make_corpus(tmp_path / "corpus", rows=300)
    make_corpus(corpus / "held_out", rows=51, seed=1)
    for how in ("layers", "model") if whole else ("layers",):

        def values(name: str, how: str = how) -> dict[str, Any]:
            return configuration(
                tmp_path / f"{how}-{name}",
                corpus,
                steps=8,
                optimizer={"lr": 2e-3},
                evaluation={"every_steps": 3},
                checkpoint={"every_steps": 3},
                training={"compile": how},
            )

        lives = [
            Life([(values("undisturbed"), None)]),
            Life([(values("again"), None)]),
            Life([(values("killed"), None)], kill=("step", 5)),
            # Resume without compilation is refused, and changes nothing.
            Life([({**values("killed"), "training": {"steps": 8}}, "auto"), (values("killed"), "auto")]),
        ]
        answers = run_ranks(live, 1, lives, free_ports(len(lives)), timeout=3600)[0]
        assert answers[:3] == [[None], [None], "killed"], answers
        refused, resumed = answers[3]
        assert resumed is None
        assert f"training.compile was '{how}', is 'none'" in refused
        names = ("step", "loss", "grad_norm", "data_digest", "mask_digest", "held_out_loss")
        undisturbed, again, killed = (
            [tuple(line.get(key) for key in names) for line in metrics(tmp_path / f"{how}-{run}")]
            for run in ("undisturbed", "again", "killed")
        )
        assert len(undisturbed) == 8
        assert undisturbed == again == killed
