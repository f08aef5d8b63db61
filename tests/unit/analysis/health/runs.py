"""Records of runs made up for tests: healthy ones, into which single faults are put."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maskvr_ds.run_folder.layout import CONFIG, LAUNCHES, METRICS

Line = dict[str, Any]
VOCABULARY = 8192


def healthy(steps: int = 600, seed: int = 0, noise: float = 0.05) -> list[Line]:
    """Lines of a run whose loss falls from ln V to 3 nats, with noise, and whose gradient norm falls to a third."""
    random = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-4 * step / steps)
        seconds = 0.5 * random.lognormal(0, 0.1)
        line: Line = {
            "step": step,
            "samples": 64 * step,
            "tokens": 8192 * step,
            "loss": math.log(VOCABULARY) * (1 - progress) + 3 * progress + noise * random.standard_normal(),
            "lr": 0.01 * min(1, step / 50),
            "grad_norm": (1.5 - progress) * random.lognormal(0, 0.2),
            "trust_ratio_min": 0.01,
            "trust_ratio_median": 0.05,
            "trust_ratio_max": 1.5,
            "skipped_updates": 0,
            "tokens_per_second": 8192 / seconds,
            "step_seconds": seconds,
        }
        if step % 100 == 0:
            line |= {"held_out_loss": line["loss"] + 0.05, "held_out_unigram_entropy": 6.5}
        lines.append(line)
    return lines


def write_run(
    folder: Path,
    lines: list[Line],
    events: list[Line] | None = None,
    *,
    tokenizer: str = "a" * 64,
    launched: bool = True,
    **sections: Any,
) -> Path:
    """A run folder with these records. sections: of its configuration. launched: whether it has launches.jsonl."""
    folder.mkdir(parents=True)
    content = [*lines, *(events or [])]
    text = "".join(json.dumps(line) + "\n" for line in content)
    (folder / METRICS).write_text(text, encoding="utf-8")
    config = {"output_dir": str(folder), "data": {"path": "corpus"}, "training": {"steps": 1000}, **sections}
    (folder / CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
    corpus = {"vocab_size": VOCABULARY, "tokenizer_sha256": tokenizer, "sequence_length": 128}
    keys = ("time", "command", "ranks_per_host", "versions")
    launch = {**dict.fromkeys(keys), "ranks": 1, "device": "cpu", "corpora": [corpus]}
    if launched:
        (folder / LAUNCHES).write_text(json.dumps(launch) + "\n", encoding="utf-8")
    return folder
