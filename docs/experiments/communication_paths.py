"""DeepSpeed's ways to reduce gradients in bf16: collectives and bytes of a step, and what they do to the losses.

    python docs/experiments/communication_paths.py --output docs/results/communication/paths.json

Each way trains the same small model for 20 steps without dropout on 1 to 4 gloo ranks. The collectives of the third
step are counted; losses are compared with those of zero1_fp32 on one rank. How inexact sums in bf16 are is measured by
more micro-batches in one process. Then what the model of `maskvr plan` expects of BERT-large on 8, 64 and 512 H100
(docs/explanation/planning.md). Ten minutes on two cores.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskvr_ds.config import ModelConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.planning.communication import collectives
from maskvr_ds.planning.hardware import GPUS, LINKS, Cluster
from maskvr_ds.planning.memory import Pass
from maskvr_ds.planning.sizes import encoder_sizes
from maskvr_ds.planning.step_time import Calibration, step_time
from maskvr_ds.planning.zero import zero_settings

RANKS = (1, 2, 3, 4)
# Rows of a pass over all ranks: a multiple of every number of them.
STEPS, ACCUMULATION, ROWS, L = 20, 2, 12, 32
VOCABULARY = 2_304
SMALL = {"num_hidden_layers": 2, "hidden_size": 320, "num_attention_heads": 5, "max_position_embeddings": L}
BUCKET = {"reduce_bucket_size": 1_000_000}
# Name → a file of ds_configs/, and what is changed in it.
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 1, fp32 sums (zero1_bf16)": ("zero1_bf16", {}),
    "stage 1, bf16 sums, fp32 sent": ("zero1_bf16", {"data_types": {"grad_accum_dtype": "bf16"}}),
    "stage 1, bf16 sums, bf16 sent": (
        "zero1_bf16",
        {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"},
    ),
    "stage 2, bf16 sent (zero2_bf16)": ("zero2_bf16", {}),
    "stage 2, bf16 sent, buckets of 1 M": ("zero2_bf16", {"zero_optimization": BUCKET}),
    "stage 2, bf16 sent, to owners": ("zero2_bf16", {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}}),
    "stage 2, fp32 sent": ("zero2_bf16", {"communication_data_type": "fp32"}),
    "stage 2, fp32 sent, to owners": (
        "zero2_bf16",
        {"communication_data_type": "fp32", "zero_optimization": {"use_multi_rank_bucket_allreduce": False}},
    ),
    "stage 3, fp32 sent (zero3_bf16)": ("zero3_bf16", {}),
}
REFERENCE = "zero1_fp32"


def deepspeed_file(folder: Path, name: str) -> Path:
    """The configuration of a path as a file."""
    base, changes = PATHS.get(name, (name, {}))
    content = json.loads(deepspeed_config_path(base).read_text(encoding="utf-8"))
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / f"{abs(hash(name))}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def train_path(folder: Path, corpus: Path, deepspeed: Path) -> dict[str, Any]:
    """On a rank: train; losses of all steps, and the collectives of the third one."""
    import torch

    from maskvr_ds import train
    from maskvr_ds.benchmarks.step_parts import StepParts, Traffic, recording
    from maskvr_ds.config import RunConfig
    from maskvr_ds.engine.deepspeed_patches import free_memory
    from maskvr_ds.run_folder.layout import METRICS
    from maskvr_ds.runtime import distributed
    from maskvr_ds.telemetry.metrics_file import read_lines

    ranks, traffic = distributed.world_size(), Traffic()
    values = {
        "output_dir": str(folder / "run"),
        "deepspeed": str(deepspeed),
        "data": {"path": str(corpus)},
        "model": {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "batch": {"global_size": ROWS * ACCUMULATION, "micro_size": ROWS // ranks},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 5},
        "training": {"steps": STEPS},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "monitor": {"tensorboard": False},
    }
    train.plot_loss = lambda *_: None
    with recording(StepParts(torch.device("cpu")), traffic, counted_step=2):
        train.train(RunConfig.model_validate(values))
    losses = [line["loss"] for line in read_lines(folder / "run" / METRICS)]
    free_memory()
    return {
        "losses": losses,
        "collectives": traffic.figures(),
        "in_backward": dict(traffic.in_backward),
        "megabytes_sent": traffic.sent(ranks) / 1e6,
    }


def measure(names: list[str], answer: Path) -> None:
    """On a rank: all paths in turn. Rank 0 writes the answer."""
    from maskvr_ds.benchmarks import corpus
    from maskvr_ds.runtime import distributed

    corpus.VOCABULARY = VOCABULARY
    distributed.initialize()
    rank0, results = distributed.rank() == 0, {}
    folder = Path(distributed.broadcast_object(tempfile.mkdtemp()))
    if rank0:
        corpus.make_corpus(folder / "corpus", rows=2_000, sequence_length=L)
    for index, name in enumerate(names):
        run = folder / str(index)
        file = None
        if rank0:
            run.mkdir()
            file = deepspeed_file(run, name)
        results[name] = train_path(run, folder / "corpus", distributed.broadcast_object(file))
    if rank0:
        answer.write_text(json.dumps(results), encoding="utf-8")
    distributed.shut_down()


def run_ranks(names: list[str], ranks: int) -> dict[str, Any]:
    """`measure` in as many processes."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--rank", str(answer), *names]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(command, env={**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(ranks)
        ]
        if any(process.wait() for process in processes):
            raise SystemExit(f"a rank of {ranks} failed")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def errors_of_sums(accumulations: Sequence[int]) -> dict[int, float]:
    """‖sum in bf16 − sum in fp32‖ / ‖sum in fp32‖ of so many micro-batches' bf16 gradients of the small model."""
    import torch

    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.encoder import MaskedLanguageModel
    from maskvr_ds.models.losses import weighted_loss

    torch.manual_seed(0)
    config = ModelConfig.model_validate({**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    module = MaskedLanguageModel(transformers_config(config, vocab_size=VOCABULARY, pad_id=0)).bfloat16()
    parameters = [p for p in module.parameters() if p.requires_grad]
    exact, rounded = ([torch.zeros_like(p, dtype=d) for p in parameters] for d in (torch.float32, torch.bfloat16))
    found, predictions = {}, round(0.15 * L)
    for number in range(1, max(accumulations) + 1):
        tokens = torch.randint(1000, VOCABULARY, (ROWS, L))
        positions = torch.stack([torch.randperm(L)[:predictions] for _ in range(ROWS)])
        batch = MaskedBatch(tokens, positions, tokens.gather(1, positions), torch.ones(ROWS, predictions))
        gradients = torch.autograd.grad(weighted_loss(module, batch) / positions.numel(), parameters)
        torch._foreach_add_(rounded, gradients)
        torch._foreach_add_(exact, [gradient.float() for gradient in gradients])
        if number in accumulations:
            apart = torch.cat([(a - b).flatten() for a, b in zip(rounded, exact, strict=True)])
            found[number] = float(apart.norm() / torch.cat([a.flatten() for a in exact]).norm())
    return found


def expected(accumulations: dict[int, int]) -> list[dict[str, Any]]:
    """What the model of `maskvr plan` expects of BERT-large, L = 128, micro-batches of 128 on nodes of 8 H100.

    accumulations: by number of GPUs.
    """
    sizes, found = encoder_sizes(ModelConfig.model_validate({"preset": "bert-large"}), 30_522), []
    with tempfile.TemporaryDirectory() as folder:
        for name in PATHS:
            zero = zero_settings(read_deepspeed_config(deepspeed_file(Path(folder), name)))
            for link in ("8x400G", "1x400G"):
                for gpus, accumulation in accumulations.items():
                    cluster = Cluster(gpus // 8, 8, GPUS["h100"], LINKS[link] * 1e9 / 8)
                    work = Pass(128, 19, 128, accumulation)
                    times = step_time(
                        sizes, zero, work, cluster, optimizer="lamb", fused=True, calibration=Calibration()
                    )
                    sent = sum(one.wire(gpus) for one in collectives(sizes, zero, accumulation))
                    found.append(
                        {
                            "path": name,
                            "link": link,
                            "gpus": gpus,
                            "accumulation": accumulation,
                            "gigabytes_sent": sent / 1e9,
                            "reduction_milliseconds": 1e3 * times.reduction,
                            "step_milliseconds": 1e3 * times.total,
                        }
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.names, arguments.rank)
        return
    names = list(PATHS)
    counted = {ranks: run_ranks([REFERENCE, *names] if ranks == 1 else names, ranks) for ranks in RANKS}
    reference = counted[1].pop(REFERENCE)["losses"]
    for ranks, results in counted.items():
        for name, result in results.items():
            losses = result.pop("losses")
            result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
            calls = ", ".join(
                f"{one} {n['calls']} × {n['bytes'] / n['calls'] / 1e6:.2f} MB"
                for one, n in result["collectives"].items()
            )
            print(
                f"{ranks} ranks, {name}: {calls}; {result['megabytes_sent']:.2f} MB sent, within backward "
                f"{result['in_backward']}, losses differ by at most {result['largest_loss_difference']:.1e}"
            )
    sums = errors_of_sums((2, 8, 64, 512))
    print("errors of sums in bf16 by micro-batches:", sums)
    # A global batch of 65,536.
    planned = expected({8: 64, 64: 8, 512: 1})
    for one in planned:
        print(one)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "accumulation": ACCUMULATION,
            "parameters": encoder_sizes(ModelConfig.model_validate(SMALL), VOCABULARY).total,
            "counted": counted,
            "errors_of_sums_in_bf16": sums,
            "expected": planned,
        }
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
