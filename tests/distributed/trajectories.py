"""A small BERT trained by a DeepSpeed engine, compared with a float64 reference.

fp32: the reference trains a float64 model on the full batch independently: forward, backward, clipping, update. This
also covers DeepSpeed's averaging over ranks and accumulation steps, and its clipping.
bf16, fp16: a free-running reference would measure chaos (a master weight off by 1e-7 occasionally rounds to another
16-bit value). So in every step the reference gets the averaged gradients that the engine computed; it unscales and
clips them itself, and its float64 weights are compared with the engine's fp32 master weights.
"""

import json
from dataclasses import astuple, dataclass, field
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ds_configs
from maskvr_ds import lamb
from maskvr_ds.config import BatchConfig, OptimizerConfig
from maskvr_ds.engine.ds_config import complete_deepspeed_config
from maskvr_ds.engine.master_weights import undo_initial_step
from maskvr_ds.lamb import Lamb, Lars
from maskvr_ds.optim.partitions import whole_tensors
from maskvr_ds.optim.stable_adamw import StableAdamW
from maskvr_ds.optim.variants import Variant
from tests.distributed.training import allow_fp16
from tests.reference import lamb as reference
from tests.reference.adam import ReferenceAdamW, ReferenceStableAdamW

BATCH, LENGTH, VOCABULARY = 24, 9, 61  # 24 sequences: 1, 2, 3 ranks with 1 or 4 micro-batches
LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.999), 1e-6, 0.01
CLIP, LOUDER = 1.0, 10.0  # with clipping the loss is multiplied, so that the norm is above 1 in every step

BING_BERT = Variant(bias_correction="none", min_ratio=0.01, max_ratio=0.3)
# Name → factory of the optimizer under test, class of its reference.
LAMBS: dict[str, tuple[Any, type[reference.ReferenceOptimizer]]] = {
    "paper": (lambda groups: Lamb(groups, LR, BETAS, EPS), reference.ReferenceLamb),
    "nvidia": (lambda groups: Lamb(groups, LR, BETAS, EPS, variant="nvidia"), reference.ReferenceNvidiaLamb),
    "deepspeed": (lambda groups: Lamb(groups, LR, BETAS, EPS, variant="deepspeed"), reference.ReferenceDeepSpeedLamb),
    "bing_bert": (lambda groups: Lamb(groups, LR, BETAS, EPS, variant=BING_BERT), reference.ReferenceBingBertLamb),
    "lars": (lambda groups: Lars(groups, LR, BETAS[0]), reference.ReferenceLars),
}
OPTIMIZERS = {
    **LAMBS,
    "stable_adamw": (lambda groups: StableAdamW(groups, LR, BETAS, EPS), ReferenceStableAdamW),
    # Constructed by DeepSpeed, as in a run.
    "adamw": (None, ReferenceAdamW),
}


@dataclass(frozen=True)
class Run:
    """One configuration of the engine."""

    stage: int
    precision: str
    clip: float = 0.0
    accumulation: int = 1
    offload: bool = False
    optimizer: str = "paper"
    model: str = "full"  # "frozen": layer 0 is; "zero_init": partitioned before the engine is created
    zero: dict[str, Any] = field(default_factory=dict, hash=False)  # further keys of zero_optimization
    more: dict[str, Any] = field(default_factory=dict, hash=False)  # further top-level keys
    steps: int = 20

    def __str__(self) -> str:
        more = "".join(f", {key} {value}" for key, value in {**self.zero, **self.more}.items())
        return (
            f"stage {self.stage}, {self.precision}, clip {self.clip}, accumulation {self.accumulation}, "
            f"offload {'cpu' if self.offload else 'off'}, {self.optimizer}, {self.model} model{more}"
        )


def tiny_bert() -> torch.nn.Module:
    """Tied embeddings, biases, LayerNorms, no dropout; odd sizes, so that partition borders fall inside tensors."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=45,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def made_model(kind: str, config: dict[str, Any]) -> torch.nn.Module:
    import deepspeed

    model = tiny_bert()
    freeze(model, kind)
    if kind == "zero_init":
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    return model


def freeze(model: torch.nn.Module, kind: str) -> None:
    if kind == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer.0" not in name)


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Three groups: with weight decay; without; LayerNorms without, at half the learning rate."""
    decaying, others = lamb.parameter_groups(model, DECAY)
    norms = [(name, p) for name, p in others["params"] if "LayerNorm" in name]
    others["params"] = [(name, p) for name, p in others["params"] if "LayerNorm" not in name]
    return [decaying, others, {"params": norms, "weight_decay": 0.0, "lr": LR / 2}]


def batches(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids, labels: int64 [steps, BATCH, LENGTH]; 3 labels per sequence, so that means of means are means."""
    random = np.random.default_rng(0)
    input_ids = random.integers(0, VOCABULARY, (steps, BATCH, LENGTH))
    labels = np.full_like(input_ids, -100)
    labels[..., 2:5] = random.integers(0, VOCABULARY // 4, labels[..., 2:5].shape)
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def loss_scale(optimizer: str, clip: float, step: int) -> float:
    """Factor of the loss: with clipping the norm is above 1 in every step; without, StableAdamW gets spikes to clip."""
    if clip:
        return LOUDER
    return LOUDER if optimizer == "stable_adamw" and step % 6 == 5 else 1.0


def reference_for(model: torch.nn.Module, optimizer: str) -> reference.ReferenceOptimizer:
    """The reference optimizer for the trainable parameters."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [DECAY if p.ndim > 1 else 0.0 for _, p in named]
    rates = [LR / 2 if "LayerNorm" in name else LR for name, _ in named]
    return OPTIMIZERS[optimizer][1]([p for _, p in named], decay, rates, BETAS, EPS)


def reference_run(optimizer: str, maximum: float, kind: str, steps: int) -> tuple[dict[str, np.ndarray], float]:
    """Final weights by name of a float64 training on full batches, and its minimum gradient norm."""
    weights, norms, _ = reference_history(optimizer, maximum, kind, steps)
    return weights, min(norms)


def reference_history(
    optimizer: str, maximum: float, kind: str, steps: int
) -> tuple[dict[str, np.ndarray], list[float], np.ndarray]:
    """Final weights by name of a float64 training on full batches; by step the gradient norm and, per tensor, the trust
    ratio (StableAdamW: the RMS): float64 [steps, tensors]."""
    model = tiny_bert().double()
    freeze(model, kind)
    under_way = reference_for(model, optimizer)
    norms, ratios = [], []
    for step, (input_ids, labels) in enumerate(zip(*batches(steps), strict=True)):
        model.zero_grad()
        (model(input_ids=input_ids, labels=labels).loss * loss_scale(optimizer, maximum, step)).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trained]
        norms.append(reference.clip(gradients, maximum))
        under_way.step(gradients)
        ratios.append(list(under_way.ratios))
        for p, w in zip(trained, under_way.weights, strict=True):
            p.data.copy_(w)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, norms, np.array(ratios)


def all_runs() -> list[tuple[int, Run]]:
    """(ranks, run): the full matrix, except for offload and fp16 without ZeRO, which `bind` refuses."""
    axes = (1, 2, 3), (0, 1, 2, 3), ("fp32", "bf16", "fp16"), (0.0, CLIP), (1, 4), (False, True)
    runs = [(ranks, Run(*rest)) for ranks, *rest in product(*axes)]
    return [(ranks, run) for ranks, run in runs if run.stage or not (run.offload or run.precision == "fp16")]


def chosen_runs() -> list[tuple[int, Run]]:
    """A pairwise-covering subset of the matrix, chosen greedily: one run per (ranks, stage, precision).

    Every pair of values of any two axes occurs; the assertion checks it.
    """

    def pairs(entry: tuple[int, Run]) -> set[Any]:
        ranks, run = entry
        return set(combinations(enumerate((ranks, *astuple(run)[:5])), 2))

    chosen: list[tuple[int, Run]] = []
    seen: set[Any] = set()
    for _, entries in groupby(all_runs(), key=lambda entry: (entry[0], entry[1].stage, entry[1].precision)):
        best = max(entries, key=lambda entry: len(pairs(entry) - seen))
        seen |= pairs(best)
        chosen.append(best)
    assert seen == set().union(*map(pairs, all_runs()))
    return chosen


def engine_config(run: Run) -> dict[str, Any]:
    precision = "fp32" if run.precision == "fp16" else run.precision
    # The package's own JSON if it has one: test what users run.
    file = Path(ds_configs.__file__).parent / f"zero{min(run.stage, 2)}_{precision}.json"
    config = json.loads(file.read_text())
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = run.stage
    if run.stage == 3:
        # No parameter stays unpartitioned: all are gathered, and every pad exists.
        zero.update(stage3_param_persistence_threshold=0)
    if run.precision == "fp16":
        # The initial scale is too high: the first steps overflow. It never grows: DeepSpeed would divide the gradients
        # of the step in which it grows by the new scale.
        config["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 1000, "hysteresis": 1}
    if run.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    zero.update(run.zero)
    config.update(run.more)
    config["train_batch_size"] = BATCH
    config["train_micro_batch_size_per_gpu"] = BATCH // torch.distributed.get_world_size() // run.accumulation
    config["gradient_accumulation_steps"] = run.accumulation
    config["gradient_clipping"] = run.clip
    return config


def make_engine(run: Run, how: str = "bind") -> Any:
    import deepspeed

    if run.precision == "fp16":
        allow_fp16()
    config = engine_config(run)
    model = made_model(run.model, config)
    make, groups = OPTIMIZERS[run.optimizer][0], groups_of(model)
    if make is None:
        batch = BatchConfig(global_size=BATCH, micro_size=config["train_micro_batch_size_per_gpu"])
        settings = OptimizerConfig(name=run.optimizer, lr=LR, betas=BETAS, eps=EPS, gradient_clipping=run.clip)
        config = complete_deepspeed_config(config, batch, settings, accumulation=run.accumulation)
    optimizer = make and make(groups)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, optimizer=optimizer, config=config)
    if optimizer is None:
        undo_initial_step(engine)
    elif how == "bind":
        lamb.bind(engine)
    elif how == "unaware":  # as a LAMB does that takes its flat partition for one tensor
        optimizer._layout = whole_tensors(optimizer.param_groups)
    return engine


def train(engine: Any, input_ids: torch.Tensor, labels: torch.Tensor, scale: float, last: bool = True) -> None:
    """One step on this rank's part of the batch; `last` False: without the final `engine.step`."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    micro = engine.train_micro_batch_size_per_gpu()
    rows = torch.arange(BATCH).view(world_size, -1)[rank].split(micro)
    for number, part in enumerate(rows):
        engine.backward(engine(input_ids=input_ids[part], labels=labels[part]).loss * scale)
        if last or number < len(rows) - 1:
            engine.step()


class AllReduceCounter:
    """Counts fp32 all-reduces of exactly `numel` values, a size that nothing else has here (2 × tensors)."""

    def __init__(self, numel: int) -> None:
        self.numel, self.count = numel, 0

    def __enter__(self) -> "AllReduceCounter":
        self.original = torch.distributed.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += tensor.numel() == self.numel and tensor.dtype == torch.float32
            return self.original(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        torch.distributed.all_reduce = self.original


def masters_of(engine: Any) -> dict[str, np.ndarray]:
    """Full fp32 weights by name, the masters if the model computes in 16 bits. Collective: call on all ranks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    masters: dict[torch.Tensor, torch.Tensor] = {}
    if not engine.zero_optimization_stage() and hasattr(engine.optimizer, "fp32_groups"):
        low, high = engine.optimizer.fp16_groups, engine.optimizer.fp32_groups
        masters = {p: m for ps, ms in zip(low, high, strict=True) for p, m in zip(ps, ms, strict=True)}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:  # there is no master
            with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_tensor")):
                weights[name] = parameter.detach().float().numpy().copy()
            continue
        master: torch.Tensor | None = parameter
        # With round_robin_gradients DeepSpeed's accessor returns the weights of another parameter.
        if parameter.dtype != torch.float32 or hasattr(parameter, "ds_tensor"):
            master = safe_get_full_fp32_param(parameter)
        if master is None:
            master = masters.get(parameter, parameter)
        weights[name] = master.detach().float().numpy().copy()
    return weights


def fp32_run(run: Run, how: str = "bind") -> dict[str, Any]:
    engine = make_engine(run, how)
    tensors = sum(p.requires_grad for p in engine.module.parameters())
    sums = 1 if run.optimizer == "stable_adamw" else 2  # per tensor
    with AllReduceCounter(sums * tensors) as counter:
        for step, (input_ids, labels) in enumerate(zip(*batches(run.steps), strict=True)):
            train(engine, input_ids, labels, loss_scale(run.optimizer, run.clip, step))
    optimizer = engine.basic_optimizer
    result = {"weights": masters_of(engine), "all_reduces": counter.count}
    for key, attribute in (("ratios", "trust_ratios"), ("rms", "update_rms")):
        if (values := getattr(optimizer, attribute, None)) is not None:
            result[key] = dict(zip(optimizer.tensor_names, values.tolist(), strict=how == "bind"))
    engine.destroy()
    return result


def low_precision_run(run: Run) -> tuple[float, int]:
    """Maximum ‖engine − reference‖ / ‖reference‖ over master weights after all steps; number of skipped steps."""
    from deepspeed.utils import safe_get_full_grad

    engine = make_engine(run)
    parameters = list(engine.module.parameters())
    under_way = reference_for(
        tiny_bert().to(torch.bfloat16 if run.precision == "bf16" else torch.float16), run.optimizer
    )
    for input_ids, labels in zip(*batches(run.steps), strict=True):
        train(engine, input_ids, labels, LOUDER if run.clip else 1.0, last=False)
        gradients = [(safe_get_full_grad(p) if run.stage else p.grad).double() for p in parameters]
        scale, skipped = float(engine.optimizer.loss_scale if run.precision == "fp16" else 1.0), engine.skipped_steps
        engine.step()
        if engine.skipped_steps == skipped:
            for gradient in gradients:
                gradient /= scale
            reference.clip(gradients, run.clip)
            under_way.step(gradients)
    masters = masters_of(engine)
    skipped = engine.skipped_steps
    engine.destroy()
    pairs = zip(masters.values(), under_way.weights, strict=True)
    # The gradient of a key bias is 0 (softmax ignores it): in fp16 the bias stays 0.
    return max(float((torch.from_numpy(m).double() - w).norm() / (w.norm() or 1.0)) for m, w in pairs), skipped
