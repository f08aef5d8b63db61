"""Ten healthy runs and five that are broken on purpose, judged by `maskvr health`: which findings each has.

    python docs/experiments/health_of_broken_runs.py --output DIR [--only NAME…] [--steps N]

The healthy runs differ in size, seed, optimizer and batch. Each broken one changes one thing of the first healthy one.
Text is synthetic (arithmetic progressions over a vocabulary): the context determines a masked token. One process, a few
minutes on one core per run, half an hour for the deep ones. The same command continues after an interruption. Writes
DIR/findings.json: name -> findings of the records and of the last checkpoint.
"""

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskvr_ds import train
from maskvr_ds.analysis.health.checkpoint import judge_checkpoint, measure_checkpoint
from maskvr_ds.analysis.health.records import judge, read_records
from maskvr_ds.config import RunConfig
from maskvr_ds.models import encoder
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.runtime import distributed
from tests.support.corpora import SPECIAL, make_corpus

VOCABULARY, LENGTH = 60, 32
BASE: dict[str, Any] = {
    "model": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64},
    "batch": {"global_size": 32, "micro_size": 32},
    "optimizer": {"lr": 0.01},
    "schedule": {"warmup_share": 0.1},
    "evaluation": {"every_steps": 100, "rows": 64},
    "checkpoint": {"every_steps": 50, "keep_last": 2},
    "monitor": {"tensorboard": False},
    "deepspeed": "zero1_fp32",
}
Sections = dict[str, Any]


def _model(layers: int, hidden: int, **more: Any) -> Sections:
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 32, **more}


ADAM = {"name": "adamw", "lr": 1e-3}
HEALTHY: dict[str, Sections] = {
    "base": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2, "batch": {"global_size": 64}},
    "wide": {"seed": 3, "model": _model(2, 128)},
    "deep": {"seed": 4, "model": _model(6, 64)},
    "small": {"seed": 5, "model": _model(1, 32)},
    "adamw": {"seed": 6, "optimizer": ADAM},
    "adamw deep": {"seed": 7, "optimizer": ADAM, "model": _model(4, 96)},
    "small batch": {"seed": 8, "batch": {"global_size": 16, "micro_size": 16}},
    "long warm-up": {"seed": 9, "schedule": {"warmup_share": 0.3}, "model": _model(3, 64)},
}
# A width of 64 has with 0.07 the variance of BERT-base's maps: 0.02² · 768 = 0.07² · 64 within 2%.
_POST_NORM = {"optimizer": {"name": "adamw", "lr": 3e-3}, "schedule": {"warmup_share": 0.0}}
BROKEN: dict[str, Sections] = {
    "lr x 30": {"optimizer": {"lr": 0.3}},
    "initializer x 10": {"model": {"initializer_range": 0.2}},
    "post-LayerNorm, depth 24, no warm-up": {**_POST_NORM, "model": _model(24, 64, initializer_range=0.07)},
    "dead embedding rows": {},
    "spike in the data": {},
    "fp16 overflows": {"deepspeed": "fp16", "training": {"steps": 220}},
}
# Fixed before the runs: one of these findings must be there.
EXPECTED: dict[str, set[str]] = {
    "lr x 30": {"relative step size"},
    "initializer x 10": {"loss at the start", "layer Jacobians"},
    "post-LayerNorm, depth 24, no warm-up": {"context is used", "gradients over depth", "layer Jacobians"},
    "dead embedding rows": {"embedding rows"},
    "spike in the data": {"loss spikes"},
    "fp16 overflows": {"fp16 loss scale"},
}
_SPIKE = range(300, 306)
_DEAD = range(len(SPECIAL), len(SPECIAL) + 8)


def configuration(folder: Path, corpus: Path, steps: int, sections: Sections) -> RunConfig:
    values = {**json.loads(json.dumps(BASE)), "training": {"steps": steps}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    values.update(output_dir=str(folder), data={"path": str(corpus)})
    if values["deepspeed"] == "fp16":
        values["deepspeed"] = str(_impatient_fp16(folder.parent / "fp16.json"))
    return RunConfig.model_validate(values)


def _impatient_fp16(path: Path) -> Path:
    """fp16 that doubles the loss scale every ten steps, so that gradients overflow again and again."""
    content = json.loads((Path(__file__).parents[2] / "ds_configs/zero1_fp16.json").read_text(encoding="utf-8"))
    content["fp16"]["loss_scale_window"] = 10
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def allow_fp16_on_cpus(_: RunConfig) -> Any:
    """DeepSpeed asks for fast fp16 matrix products, which few CPUs have; torch's slow ones do."""
    get_accelerator().is_fp16_supported = lambda: True
    return lambda: None


def damage_batches(run: RunConfig) -> Any:
    """Replace the tokens of a few batches by random ones; returns what undoes it."""
    original = train.batches

    def batches(*args: Any) -> Any:
        random = np.random.default_rng(0)
        for number, batch in original(*args):
            if number in _SPIKE:
                ids = batch.input_ids
                drawn = random.integers(len(SPECIAL), len(SPECIAL) + VOCABULARY, (*ids.shape,))
                batch.input_ids.copy_(torch.from_numpy(drawn.astype(np.uint16)))
            yield number, batch

    setattr(train, "batches", batches)  # noqa: B010
    return lambda: setattr(train, "batches", original)


def freeze_rows(run: RunConfig) -> Any:
    """Zero the embedding rows of a few frequent tokens and keep gradients away from them; returns what undoes it."""
    original = encoder.build

    def build(config: Any) -> Any:
        model = original(config)
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            table[_DEAD] = 0.0
        table.register_hook(lambda g: g.index_fill(0, torch.tensor(_DEAD), 0.0))
        return model

    encoder.build = build
    return lambda: setattr(encoder, "build", original)


INJECT = {
    "spike in the data": damage_batches,
    "dead embedding rows": freeze_rows,
    "fp16 overflows": allow_fp16_on_cpus,
}


def findings_of(name: str, run: RunConfig, *, at_checkpoint: bool) -> dict[str, Any]:
    """Train, then judge records and last checkpoint."""
    undo = INJECT[name](run) if name in INJECT else lambda: None
    ended = None
    try:
        train.train(run, resume="auto")
    except (FloatingPointError, ArithmeticError) as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        undo()
    records = read_records(run.output_dir)
    judged = judge(records)
    if at_checkpoint and checkpoints.complete_checkpoints(run.output_dir):
        folder = checkpoints.newest(run.output_dir)
        step = checkpoints.read_state(folder).step
        lr = next(line["lr"] for line in records.lines if line["step"] == step)
        judged += judge_checkpoint(measure_checkpoint(folder, run.data.corpora[0].path, rows=8, lr=lr))
    losses = [line["loss"] for line in records.lines if line["loss"] is not None]
    return {
        "findings": {f.check: f.text for f in judged if f.status == "finding"},
        "judged": sum(f.status != "not judged" for f in judged),
        "loss": [losses[0], float(np.median(losses[-20:]))] if losses else [math.nan, math.nan],
        "ended": ended,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--only", nargs="+", choices=[*HEALTHY, *BROKEN], default=[*HEALTHY, *BROKEN])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    corpus = arguments.output / "corpus"
    if not corpus.exists():
        make_corpus(corpus, rows=20_000, length=LENGTH, words=VOCABULARY, shard_rows=10_000)
        make_corpus(corpus / "held_out", rows=256, length=LENGTH, words=VOCABULARY, seed=1)
    train.plot_loss = lambda *_: None
    logging.disable(logging.WARNING)
    stored = arguments.output / "findings.json"
    results: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}

    def run() -> None:
        for name in arguments.only:
            if name in results:
                continue
            folder = arguments.output / name.replace(" ", "_").replace(",", "")
            config = configuration(folder, corpus, arguments.steps, {**HEALTHY, **BROKEN}[name])
            results[name] = found = findings_of(name, config, at_checkpoint=True)
            print(f"{name}: loss {found['loss']}, {found['judged']} checks, {found['findings'] or 'ok'}", flush=True)
            stored.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    status = distributed.run_as_rank(run)
    false = sum(len(results[name]["findings"]) for name in HEALTHY if name in results)
    named = {name: bool(EXPECTED[name] & set(results[name]["findings"])) for name in BROKEN if name in results}
    print(f"false findings: {false} over {sum(n in results for n in HEALTHY)} healthy runs; broken runs named: {named}")
    return status


if __name__ == "__main__":
    sys.exit(main())
