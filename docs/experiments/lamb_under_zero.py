"""LAMB under ZeRO with and without norms across partitions: the same training three ways, on real text.

- plain: a textbook LAMB on the model's own tensors, one process, no DeepSpeed: the reference.
- bound: `maskvr_ds.lamb.Lamb` under ZeRO, with `bind(engine)`.
- unaware: the same textbook LAMB under ZeRO, as `"zero_allow_untested_optimizer": true` permits. It sees one flat
  partition per parameter group and treats it as a tensor.

    python docs/experiments/lamb_under_zero.py --corpus corpus/ --output docs/results/lamb_under_zero

Every learning rate × seed is trained with `bound` and `unaware` on the first of `--ranks`; then, at the learning rate
at which each has the lowest held-out loss, `bound` and `unaware` on the other numbers of ranks, `unaware` on one rank,
and `plain`. One line of runs.jsonl per run; existing runs are not repeated. summary.json, summary.md and
lamb_under_zero.png are made from runs.jsonl alone.

The model has no dropout, since its random numbers would depend on the ranks; everything else is equal for equal seeds.
"""

import argparse
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed.utils import logger
from lamb_under_zero_report import RUNS, Job, best_rate, job_of, read_runs, write_report

from data_pipeline.shards import Corpus
from maskvr_ds import hashing, lamb
from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, ScheduleConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.ds_config import complete_deepspeed_config
from maskvr_ds.engine.engine import set_learning_rate
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.losses import weighted_loss
from maskvr_ds.runtime import distributed
from maskvr_ds.training.held_out import HeldOut
from maskvr_ds.training.schedule import learning_rate

_WEIGHTS, _ORDER, _MASKS = range(3)
_RECORD_EVERY = 10  # steps between recorded trust ratios
_HELD_OUT_ROWS = 256


class TextbookLamb(torch.optim.Optimizer):
    """LAMB as in the paper, for each tensor of `param_groups`: correct if those are the model's tensors.

    ratios: tensor → trust ratio of the last step.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.ratios: dict[torch.Tensor, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for w in (p for p in group["params"] if p.grad is not None):
                (beta1, beta2), g, state = group["betas"], w.grad, self.state[w]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
                state["step"] += 1
                m = state["exp_avg"].lerp_(g, 1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
                u = m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * w
                w_norm, u_norm = (float(x.double().norm()) for x in (w, u))
                self.ratios[w] = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
                w.sub_(u, alpha=group["lr"] * self.ratios[w])


def make_trainer(job: Job, model: torch.nn.Module, options: argparse.Namespace) -> tuple[Any, Any]:
    """Engine (None for `plain`) and the optimizer that holds the trust ratios."""
    settings = OptimizerConfig(lr=job.lr)
    groups = lamb.parameter_groups(model, settings.weight_decay)
    kind = lamb.Lamb if job.method == "bound" else TextbookLamb
    optimizer: Any = kind(groups, lr=job.lr, betas=settings.betas, eps=settings.eps)
    if job.method == "plain":
        return None, optimizer
    batch = BatchConfig(global_size=options.batch, micro_size=options.batch // job.ranks)
    config = read_deepspeed_config(deepspeed_config_path(f"zero{options.stage}_fp32"))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=complete_deepspeed_config(config, batch, settings, accumulation=1)
    )
    if job.method == "bound":
        lamb.bind(engine)
    return engine, optimizer


def train(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run → its line of runs.jsonl, identical on all ranks. Collective: call on all ranks.

    losses: of every step, in nats. held_out: [step, loss] pairs. tensors: for each rank, the names of tensors stored on
    it at least in part. ratios: of every 10th step, with the first seed, by name; for `unaware`, which has no ratios of
    tensors, by "rank r, group g". Lists end early if the loss is not finite; the last held-out loss is then null.
    """
    rank, device = distributed.rank(), distributed.device()
    corpus, held_out_corpus = Corpus(options.corpus), Corpus(options.corpus / "held_out")
    manifest = corpus.manifest
    sizes = ModelConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.hidden // 64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=corpus.sequence_length,
    )
    torch.manual_seed(hashing.fold(job.seed, _WEIGHTS) >> 1)
    model = MaskedLanguageModel(
        transformers_config(sizes, vocab_size=manifest.vocab_size, pad_id=manifest.special_tokens.pad)
    ).to(device)
    names = {p: name.removeprefix("mlm.") for name, p in model.named_parameters()}
    engine, optimizer = make_trainer(job, model, options)
    parallel = {"rank": rank, "world_size": job.ranks, "device": device}
    batches = Loader(
        corpus,
        seed=hashing.fold(job.seed, _ORDER),
        global_size=options.batch,
        **parallel,  # type: ignore[arg-type]
    ).batches()
    masker = Masker.for_corpus(manifest, seed=hashing.fold(job.seed, _MASKS), device=device)
    held_out = HeldOut(
        held_out_corpus,
        rows=_HELD_OUT_ROWS,
        micro_size=_HELD_OUT_ROWS // 4,
        **parallel,  # type: ignore[arg-type]
    )
    result: dict[str, Any] = {**job._asdict(), "losses": [], "held_out": [], "ratio_steps": [], "ratios": {}}
    if engine is not None:
        mine = [name for p, name in names.items() if getattr(p, "_hp_mapping", None) is not None]
        result["tensors"] = _gather(mine)

    schedule = ScheduleConfig(warmup_steps=options.warmup)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        lr = learning_rate(step - 1, schedule, peak=job.lr, total_steps=options.steps)
        set_learning_rate(engine or argparse.Namespace(optimizer=optimizer), lr)
        loss = one_step(job, engine, model, optimizer, masker(next(batches)))
        result["losses"].append(round(loss, 6))
        if not math.isfinite(loss):
            result["losses"].pop()
            result["held_out"].append([step, None])
            break
        if job.seed == options.seeds[0] and (step % _RECORD_EVERY == 0 or step == 1):
            result["ratio_steps"].append(step)
            for name, ratio in trust_ratios(job, optimizer, names).items():
                result["ratios"].setdefault(name, []).append(float(f"{ratio:.4g}"))
        if step % options.evaluate_every == 0 or step == options.steps:
            value = held_out.figures(model)["held_out_loss"]
            result["held_out"].append([step, round(value, 6) if math.isfinite(value) else None])
    result["seconds"] = round(time.perf_counter() - start, 1)
    if engine is not None:
        engine.destroy()
    return result


def one_step(job: Job, engine: Any, model: torch.nn.Module, optimizer: Any, masked: Any) -> float:
    """Loss Σ w ℓ / predictions of the global batch before the update."""
    predictions = distributed.all_reduce_sum((masked.weights != 0).sum())
    loss = weighted_loss(engine or model, masked)
    if engine is None:
        optimizer.zero_grad()
        (loss / predictions).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OptimizerConfig().gradient_clipping)
        optimizer.step()
    else:
        engine.backward(loss * job.ranks / predictions)  # DeepSpeed averages over the ranks
        engine.step()
    return float(distributed.all_reduce_sum(loss.detach().double()) / predictions)


def trust_ratios(job: Job, optimizer: Any, names: dict[Any, str]) -> dict[str, float]:
    """Trust ratios of the last step: by tensor, or by partition for `unaware`. Collective: call on all ranks."""
    if job.method == "bound":
        tensors = [name.removeprefix("mlm.") for name in optimizer.tensor_names]
        return dict(zip(tensors, optimizer.trust_ratios.tolist(), strict=True))
    if job.method == "plain":
        return {names[p]: ratio for p, ratio in optimizer.ratios.items()}
    mine = list(optimizer.ratios.values())  # one per group's partition
    return {f"rank {r}, group {g}": x for r, ratios in enumerate(_gather(mine)) for g, x in enumerate(ratios)}


def _gather(value: Any) -> list[Any]:
    values = [None] * distributed.world_size()
    dist.all_gather_object(values, value)
    return values


def _rank_main(rank: int, jobs: Sequence[Job], port: int, options: argparse.Namespace) -> None:
    world_size = jobs[0].ranks
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    logger.setLevel("ERROR")  # hides the warning about an untested optimizer
    distributed.initialize()
    torch.set_num_threads(1)
    for job in jobs:
        result = train(job, options)
        if rank == 0:
            with (options.output / RUNS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{job}: held-out {result['held_out'][-1][1]}, {result['seconds']} s", flush=True)
    distributed.shut_down()


def train_missing(jobs: Iterable[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the `jobs` that have no run yet, in one process group per world size; → all runs."""
    done = {job_of(run) for run in read_runs(options.output)}
    missing = [job for job in jobs if job not in done]
    for ranks in sorted({job.ranks for job in missing}):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mine = [job for job in missing if job.ranks == ranks]
        mp.spawn(_rank_main, args=(mine, port, options), nprocs=ranks)
    return read_runs(options.output)


def check_settings(options: argparse.Namespace) -> None:
    """Raise SystemExit if the folder has runs with different settings."""
    fields = ("stage", "steps", "warmup", "batch", "layers", "hidden", "evaluate_every")
    settings = {field: getattr(options, field) for field in fields}
    path = options.output / "settings.json"
    if path.is_file() and (existing := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise SystemExit(f"error: {path} has {existing}, which differs from {settings}; use another --output")
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="LAMB under ZeRO: bound, unaware, plain.")
    parser.add_argument("--corpus", type=Path, required=True, help="corpus built with --held-out")
    parser.add_argument("--output", type=Path, required=True, help="output folder; runs in it are not repeated")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="the sweep uses the first (2 3)")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.005, 0.008, 0.0125, 0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--batch", type=int, default=24, help="sequences per step over all ranks (default: 24)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--evaluate-every", type=int, default=50)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    check_settings(options)

    first, *others = options.ranks
    seeds = options.seeds
    start = time.perf_counter()
    runs = train_missing(
        [Job(method, first, lr, seed) for lr in options.lrs for seed in seeds for method in ("bound", "unaware")],
        options,
    )
    bound, unaware = (best_rate(runs, method, first) for method in ("bound", "unaware"))
    jobs = [Job("bound", ranks, bound, seed) for ranks in others for seed in seeds]
    jobs += [Job("unaware", ranks, unaware, seed) for ranks in (1, *others) for seed in seeds]
    jobs += [Job("plain", 1, bound, seed) for seed in seeds]
    runs = train_missing(jobs, options)
    minutes = (time.perf_counter() - start) / 60
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    print(write_report(runs, options.output, ranks=first, versions=versions))
    print(f"{minutes:.1f} minutes of training in this call, {sum(run['seconds'] for run in runs) / 60:.1f} in total")


if __name__ == "__main__":
    main()
