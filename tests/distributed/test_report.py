"""What a run says before its first step and after its last one; its length in epochs on any number of ranks."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from maskvr_ds.cli.main import command_parser
from maskvr_ds.config import load_config
from maskvr_ds.run_folder.layout import CONFIG
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, metrics, run_command, train_all
from tests.support.corpora import make_corpus

ROWS, LENGTH, SIZE = 90, 32, 12
STEPS = 15  # two epochs of 90 rows by 12, exactly


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` (by the function, on one rank) and `two` (by the command, on two), with the command's output."""
    folder = tmp_path_factory.mktemp("report")
    corpus = make_corpus(folder / "corpus", rows=ROWS, length=LENGTH, words=20)
    make_corpus(corpus / "held_out", rows=30, length=LENGTH, words=20, seed=1)
    for name in ("one", "two"):
        values = configuration(folder / name, corpus, steps=0)
        values["training"] = {"epochs": 2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert run_ranks(train_all, 1, [(yaml.safe_load((folder / "one.yaml").read_text()), None)]) == [[None]]
    done = run_command("train", "--config", folder / "two.yaml", "--num-gpus", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "output").write_text(done.stdout)
    return folder


def test_epochs_are_the_same_steps_on_any_number_of_ranks(folder: Path) -> None:
    assert column(folder / "one", "step", "epoch", "data_digest") == column(
        folder / "two", "step", "epoch", "data_digest"
    )
    assert [line["epoch"] for line in metrics(folder / "two")] == [
        pytest.approx(step * SIZE / ROWS) for step in range(1, STEPS + 1)
    ]
    for name in ("one", "two"):
        assert load_config(folder / name / CONFIG).training.model_dump(exclude_defaults=True) == {"steps": STEPS}


def test_lines_before_the_first_step(folder: Path) -> None:
    lines = (folder / "output").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("model "))
    model, corpus, step, masks, length, output = lines[first : first + 6]
    assert re.fullmatch(r"model     [\d,]+ parameters, float32, ZeRO stage 1", model)
    tokens = f"{ROWS * LENGTH:,}"
    assert corpus == f"corpus    {folder / 'corpus'}: {ROWS} rows of {LENGTH}, {tokens} tokens; held out: 30 rows"
    assert step == "step      12 rows = 384 tokens: 2 ranks × 3 micro-batches of 2"
    assert masks == f"masks     uniform: 5 of {LENGTH - 2} tokens of a full row"
    assert length == "length    15 steps = 5,760 tokens = 2 epochs"
    assert output.startswith(f"output    {folder / 'two'}: checkpoints at the end, metrics.jsonl")
    (time,) = [line for line in lines if line.startswith("time ")]
    assert re.fullmatch(r"time      about \d+ s for the remaining 9 steps \(\S+ s each\), evaluations .*", time)


def test_lines_after_the_last_step(folder: Path) -> None:
    lines = (folder / "output").read_text().splitlines()
    done, held_out, *commands = lines[-5:]
    assert done == f"done      step {STEPS}, {folder / 'two' / 'checkpoints' / f'step-{STEPS:08d}'}"
    last = metrics(folder / "two")[-1]
    loss, entropy = last["held_out_loss_mask"], last["held_out_unigram_entropy"]
    both = f"{loss:.3f} nats behind [MASK] ({last['held_out_loss']:.3f} over all predictions)"
    assert held_out.startswith(f"held out  loss {both} at step {STEPS}, accuracy ")
    assert f"{abs(entropy - loss):.3f} {'below' if loss <= entropy else 'above'} the unigram entropy" in held_out
    assert commands[0].startswith("next      maskvr export")
    # They are commands as they stand.
    names = [command_parser().parse_args(shlex.split(line[10:])[1:]).run.__name__ for line in commands]
    assert names == ["_export", "_evaluate", "_plot"]


def test_warnings(folder: Path, tmp_path: Path) -> None:
    words = ("config", "--config", folder / "one.yaml", "--set", "training.epochs=null")
    many = run_command(*words, "--set", "training.steps=3000")
    assert many.returncode == 0
    assert "warning: training.steps 3,000: 400 epochs of" in many.stderr
    large = run_command(*words, "--set", "training.steps=9", "--set", "batch.global_size=100")
    assert "warning: batch.global_size 100: larger than an epoch of" in large.stderr
    both = run_command(*words[:3], "--set", "training.steps=3")
    assert both.returncode == 1
    assert "training.steps 3 and training.epochs 2 both set the length of the training" in both.stderr
    resolved = run_command(*words[:3])
    assert yaml.safe_load(resolved.stdout)["training"]["steps"] == STEPS
