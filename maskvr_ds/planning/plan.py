"""`maskvr plan`: micro-batch, memory, time and energy of a run on a cluster. Loads no torch.

docs/explanation/planning.md has the formulas and every assumption.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from maskvr_ds.config import ConfigError, RunConfig, deepspeed_config_path, run_deepspeed_config
from maskvr_ds.config.deepspeed import enabled, read_deepspeed_config
from maskvr_ds.config.phases import schedule_span
from maskvr_ds.masking.checks import hidden_positions
from maskvr_ds.masking.rates import hidden_in, shares_of_stages
from maskvr_ds.planning.calibration import predictions
from maskvr_ds.planning.communication import collectives
from maskvr_ds.planning.corpora import Corpus
from maskvr_ds.planning.hardware import USABLE, Cluster
from maskvr_ds.planning.memory import Memory, Pass, memory
from maskvr_ds.planning.sizes import EncoderSizes, encoder_sizes
from maskvr_ds.planning.step_time import Calibration, StepTime, mask_launches, mean_time, step_time
from maskvr_ds.planning.zero import Zero, zero_settings
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE

# Numbers of GPUs of the table of efficiency.
SCALES = (8, 16, 32, 64, 128, 256, 512)
_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Scale:
    """A phase on another number of GPUs. efficiency: sequences per second and GPU, relative to one GPU."""

    gpus: int
    micro: int
    accumulation: int
    step_seconds: float
    tokens_per_second: float
    efficiency: float


@dataclass(frozen=True)
class PhasePlan:
    """One phase. micro: the largest micro-batch that fits; configured: batch.micro_size, with what it takes.

    predictions: slots of a row, the most of the phase. last_predictions: those of its last steps.
    attention: data.attention. pairs_share: share of all pairs of a row's positions that are in one document; None if
    unknown: then all are counted. computed_share: those that take time, all of them without Flash Attention. padding:
    share of the positions that are padding, which are counted as tokens; None if unknown.
    stages: ZeRO stage, checkpointing → memory at `micro`, and the largest micro-batch. wire: bytes that a GPU sends per
    step, by collective. of_peak: model FLOPs per second relative to the GPU's data sheet.
    """

    name: str
    sequence_length: int
    predictions: int
    last_predictions: int
    attention: str
    pairs_share: float | None
    computed_share: float
    padding: float | None
    steps: int
    global_size: int
    micro: int
    accumulation: int
    memory: Memory
    step: StepTime
    tokens_per_second: float
    model_tflops: float
    of_peak: float
    days: float
    configured_micro: int
    configured_memory: Memory
    configured_seconds: float | None
    stages: tuple[tuple[int, bool, Memory, int | None], ...]
    wire: dict[str, float]
    scales: tuple[Scale | None, ...]


@dataclass(frozen=True)
class Plan:
    """A run on a cluster. kilowatt_hours: of the GPUs alone, at their power limit."""

    cluster: Cluster
    deepspeed: str
    stage: int
    parameters: dict[str, int]
    usable_memory: float
    calibration: Calibration
    phases: tuple[PhasePlan, ...]
    days: float
    kilowatt_hours: float

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        for phase, mine in zip(values["phases"], self.phases, strict=True):
            phase["stages"] = [
                {"stage": stage, "activation_checkpointing": again, "memory": asdict(found), "largest_micro": micro}
                for stage, again, found, micro in mine.stages
            ]
            phase["scales"] = [scale for scale in phase["scales"] if scale]
        return values


class _Stage(NamedTuple):
    """late: number of layers below late mask tokens, and positions that they have less of. share: of the steps."""

    predictions: int
    late: tuple[int, int]
    share: float


class _Phase:
    """One phase of a run, on any number of GPUs and with any micro-batch.

    begin: its first step in its schedule. stages: predictions, late mask tokens and share of the steps, by stage of a
    schedule of the masking rate; memory is that of the most predictions, time and FLOPs are means over the steps.
    """

    def __init__(
        self, config: RunConfig, corpus: Corpus, name: str, cluster: Cluster, calibration: Calibration, begin: int
    ):
        self.config, self.name, self.cluster, self.calibration = config, name, cluster, calibration
        self.length, self.corpus = corpus.length, corpus
        self.sizes: EncoderSizes = encoder_sizes(config.model, corpus.vocabulary)
        masking = config.masking
        self.stages = self._stages(begin)
        if masking.late_layer >= self.sizes.layers:
            raise ConfigError(
                f"masking.late_layer {masking.late_layer}: [MASK] must enter before the last of {self.sizes.layers} "
                "layers"
            )
        self.checkpointing = config.model.activation_checkpointing
        # DeepSpeed's Adam is one kernel, too.
        self.fused = config.optimizer.fused or config.optimizer.name == "adamw"

    def computed_pairs(self, zero: Zero) -> float | None:
        """Flash Attention, in half precision only, skips pairs of different documents; otherwise they are masked."""
        return self.corpus.pairs if zero.element == 2 else None

    def _stages(self, begin: int) -> list[_Stage]:
        masking, layer = self.config.masking, self.config.masking.late_layer
        if masking.strategy == "auto" or masking.final_rate is None:
            # When the rate falls under strategy auto, only measurements know.
            hidden = hidden_positions(masking, self.length) if layer else 0
            return [_Stage(predictions(self.length, masking.rate), (layer, hidden), 1.0)]
        steps = _steps(self.config, self.length)
        total = self.config.training.schedule_steps or steps
        found = shares_of_stages(masking, self.length, first=begin, steps=steps, total_steps=total)
        return [
            _Stage(stage.slots, (layer, hidden_in(masking, self.length, stage) if layer else 0), share)
            for stage, share in found
        ]

    @property
    def predictions(self) -> int:
        return max(stage.predictions for stage in self.stages)

    def work(
        self,
        micro: int,
        ranks: int,
        checkpointing: bool | None = None,
        *,
        pairs: float | None = None,
        stage: _Stage | None = None,
    ) -> Pass:
        """stage: None: that of the most predictions, with the fewest hidden positions."""
        again = self.checkpointing if checkpointing is None else checkpointing
        accumulation = self.config.batch.global_size // (micro * ranks)
        late = min(each.late for each in self.stages) if stage is None else stage.late
        number = self.predictions if stage is None else stage.predictions
        return Pass(self.length, number, micro, accumulation, again, pairs, late=late)

    def memory(self, zero: Zero, micro: int, ranks: int, checkpointing: bool | None = None) -> Memory:
        work, factor = self.work(micro, ranks, checkpointing), self.calibration.activations
        return memory(self.sizes, zero, work, ranks=ranks, fused=self.fused, factor=factor)

    def time(self, zero: Zero, micro: int, cluster: Cluster) -> StepTime:
        found = [
            step_time(
                self.sizes,
                zero,
                self.work(micro, cluster.ranks, pairs=self.computed_pairs(zero), stage=stage),
                cluster,
                optimizer=self.config.optimizer.name,
                fused=self.fused,
                calibration=self.calibration,
                masks=mask_launches(self.config.masking),
            )
            for stage in self.stages
        ]
        return mean_time(found, [stage.share for stage in self.stages])

    @property
    def pairs_share(self) -> float | None:
        """Share of all pairs of a row's positions that attend to each other; None if unknown."""
        if self.config.data.attention == "rows":
            return 1.0
        return None if self.corpus.pairs is None else self.corpus.pairs / self.length**2

    @property
    def flops(self) -> float:
        """Model FLOPs of a sequence: of pairs within documents, whatever the kernel computes."""
        return sum(
            stage.share * self.sizes.flops(self.length, stage.predictions, self.corpus.pairs, stage.late)
            for stage in self.stages
        )

    def largest_micro(self, zero: Zero, ranks: int, checkpointing: bool | None = None) -> int | None:
        """The largest micro-batch that divides a rank's sequences and fits; None if none does."""
        share, left = divmod(self.config.batch.global_size, ranks)
        if left or not share:
            return None
        usable = self.cluster.gpu.memory * USABLE
        for micro in reversed(_divisors(share)):
            if micro <= MAX_MICRO_SIZE and self.memory(zero, micro, ranks, checkpointing).total <= usable:
                return micro
        return None


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def make_plan(config: RunConfig, corpora: Sequence[Corpus], cluster: Cluster, calibration: Calibration) -> Plan:
    """Plan all phases of a run.

    Raises ConfigError if the ranks cannot share a global batch, a bandwidth is missing, or the model does not fit; the
    error says what would fit.
    """
    content = run_deepspeed_config(config)
    zero = zero_settings(content)
    precision = "fp16" if enabled(content, "fp16") else "bf16" if enabled(content, "bf16") else "fp32"
    phases = []
    for index, corpus in enumerate(corpora):
        name = config.phases[index].name if config.phases else ""
        first, _ = schedule_span(config.phases, index)
        begin = sum(_steps(config.phase(i), corpora[i].length) for i in range(first, index))
        phase = _Phase(config.phase(index), corpus, name, cluster, calibration, begin)
        phases.append(_plan_phase(phase, zero, _alternatives(zero, precision)))
    days = sum(phase.days for phase in phases)
    return Plan(
        cluster=cluster,
        deepspeed=config.deepspeed,
        stage=zero.stage,
        parameters=dict(phase.sizes.parameters),
        usable_memory=cluster.gpu.memory * USABLE,
        calibration=calibration,
        phases=tuple(phases),
        days=days,
        kilowatt_hours=days * 24 * cluster.ranks * cluster.gpu.power / 1000,
    )


def _alternatives(zero: Zero, precision: str) -> list[Zero]:
    """ZeRO stages of the same precision, by the files of ds_configs; the configured one as it is."""
    found = []
    for stage in _STAGES:
        if stage == zero.stage:
            found.append(zero)
        elif (stage, precision) != (0, "fp16"):
            path = deepspeed_config_path(f"zero{stage}_{precision}")
            found.append(replace(zero_settings(read_deepspeed_config(path)), offload=zero.offload and stage > 0))
    return found


def _plan_phase(phase: _Phase, zero: Zero, alternatives: Sequence[Zero]) -> PhasePlan:
    config, cluster, ranks = phase.config, phase.cluster, phase.cluster.ranks
    _check_share(config.batch.global_size, ranks)
    micro = phase.largest_micro(zero, ranks)
    if micro is None:
        raise ConfigError(_does_not_fit(phase, zero, alternatives))
    step = phase.time(zero, micro, cluster)
    steps, work = _steps(config, phase.length), phase.work(micro, ranks)
    # By trying, auto finds about what is planned here.
    given = micro if config.batch.is_auto else config.batch.micro_size
    divides = config.batch.global_size % (given * ranks) == 0
    stages = tuple(
        (other.stage, again, phase.memory(other, micro, ranks, again), phase.largest_micro(other, ranks, again))
        for other in alternatives
        for again in (False, True)
    )
    rate = config.batch.global_size * phase.flops / (step.total * ranks)
    peak = cluster.gpu.half if zero.element == 2 else cluster.gpu.single
    return PhasePlan(
        name=phase.name,
        sequence_length=phase.length,
        predictions=phase.predictions,
        last_predictions=phase.stages[-1].predictions,
        attention=config.data.attention,
        pairs_share=phase.pairs_share,
        computed_share=(phase.computed_pairs(zero) or phase.length**2) / phase.length**2,
        padding=phase.corpus.padding,
        steps=steps,
        global_size=config.batch.global_size,
        micro=micro,
        accumulation=work.accumulation,
        memory=phase.memory(zero, micro, ranks),
        step=step,
        tokens_per_second=config.batch.global_size * phase.length / step.total,
        model_tflops=rate / 1e12,
        of_peak=rate / peak,
        days=steps * step.total / 86_400,
        configured_micro=given,
        configured_memory=phase.memory(zero, given, ranks),
        configured_seconds=phase.time(zero, given, cluster).total if divides else None,
        stages=stages,
        wire={
            f"{one.kind} of {one.what}": one.wire(ranks) for one in collectives(phase.sizes, zero, work.accumulation)
        },
        scales=tuple(_scale(phase, zero, gpus, micro) for gpus in SCALES),
    )


def _scale(phase: _Phase, zero: Zero, gpus: int, micro: int) -> Scale | None:
    """The phase on `gpus` GPUs; None if they cannot share its global batch, the model does not fit on them, or the
    bandwidth between nodes is not given."""
    cluster = phase.cluster.of_ranks(gpus)
    found = phase.largest_micro(zero, gpus)
    if found is None or (cluster.nodes > 1 and cluster.link is None):
        return None
    seconds = phase.time(zero, found, cluster).total
    alone = phase.time(zero, micro, phase.cluster.of_ranks(1)).total
    size = phase.config.batch.global_size
    accumulation = phase.work(found, gpus).accumulation
    return Scale(gpus, found, accumulation, seconds, size * phase.length / seconds, alone / (gpus * seconds))


def _steps(config: RunConfig, length: int) -> int:
    """Steps of a phase. Raises ConfigError for training.epochs, whose length only the corpora know."""
    training = config.training
    if training.tokens is not None:
        return -(-training.tokens // (config.batch.global_size * length))
    if training.epochs is not None:
        raise ConfigError(
            f"training.epochs {training.epochs:g}: needs the corpora: omit --sequence-length and "
            "--vocab-size, or set training.steps"
        )
    return training.known_steps


def _check_share(size: int, ranks: int) -> None:
    if size % ranks:
        nearest = sorted({max(1, size // ranks) * ranks, (size // ranks + 1) * ranks})
        raise ConfigError(
            f"batch.global_size {size} is not a multiple of {ranks} GPUs; set it to "
            f"{' or '.join(map(str, nearest))}, or plan with another number of GPUs"
        )


def _does_not_fit(phase: _Phase, zero: Zero, alternatives: Sequence[Zero]) -> str:
    """The message for a model that does not fit as configured, naming what would fit."""
    ranks, gpu = phase.cluster.ranks, phase.cluster.gpu
    needed = phase.memory(zero, 1, ranks).total
    message = (
        f"ZeRO stage {zero.stage} needs {needed / 1e9:,.1f} GB at a micro-batch of 1 on {ranks} GPUs, and "
        f"{gpu.memory * USABLE / 1e9:,.1f} GB of {gpu.name} can be used"
    )
    choices: list[tuple[Zero, bool]] = [(one, again) for again in (False, True) for one in alternatives]
    for other, again in choices:
        if other.stage < zero.stage or phase.largest_micro(other, ranks, again) is None:
            continue
        remedies = [f"ZeRO stage {other.stage}"] if other.stage != zero.stage else []
        remedies += ["model.activation_checkpointing=true"] if again and not phase.checkpointing else []
        if remedies:
            return f"{message}; it fits with {' and '.join(remedies)}"
    least = min(phase.memory(other, 1, ranks, True).total for other in alternatives)
    return (
        f"{message}; no ZeRO stage fits, even with activation checkpointing ({least / 1e9:,.1f} GB): use more GPUs, "
        "GPUs with more memory, offload_optimizer, a smaller model or shorter sequences"
    )
