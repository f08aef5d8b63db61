"""Calibration of the predicted times and memory by results of `maskvr benchmark training-speed`. Loads no torch."""

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskvr_ds.config import ConfigError, ModelConfig, deepspeed_config_path
from maskvr_ds.config.architectures import BERT_PRESETS
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.masking.checks import round_half_up
from maskvr_ds.planning.hardware import Cluster, Gpu
from maskvr_ds.planning.memory import Pass, memory
from maskvr_ds.planning.sizes import EncoderSizes, encoder_sizes
from maskvr_ds.planning.step_time import Calibration, step_time
from maskvr_ds.planning.zero import Zero, zero_settings

# `maskvr benchmark training-speed`: its vocabulary, rate of masked positions and optimizer.
BENCHMARK_VOCABULARY, BENCHMARK_RATE = 30_522, 0.15
# "bert-base, L = 128, zero1_bf16, 1 ranks × 256 sequences"
_COUNT = r"[1-9]\d{0,6}"
_WHAT = re.compile(
    rf"(?P<preset>[\w-]+), L = (?P<length>{_COUNT}), (?P<deepspeed>.+), "
    rf"(?P<ranks>{_COUNT}) ranks × (?P<micro>{_COUNT}) sequences"
)
_LARGEST = 20.0
# Weight of log² of the host's factor: keeps it near 1 where no measurement depends on it.
_PRIOR = 1e-3
_BYTES = 1 << 20


@dataclass(frozen=True)
class Measurement:
    """A result of `maskvr benchmark training-speed`. step_seconds: median of its steps. memory: bytes, None if not
    measured. product_rate: FLOP/s of large matrix products on the same device."""

    path: str
    device: str
    sizes: EncoderSizes
    zero: Zero
    work: Pass
    ranks: int
    step_seconds: float
    memory: float | None
    product_rate: float


def predictions(length: int, rate: float) -> int:
    """K of a row of `length` tokens, two of them special."""
    return max(1, round_half_up((length - 2) * rate))


def read_measurements(path: Path) -> list[Measurement]:
    """Read the JSON that `maskvr benchmark training-speed --output` wrote, of one micro-batch or of several.

    Raises ConfigError naming what is missing, or the setting whose effect the model does not know.
    """
    if (size := path.stat().st_size) > _BYTES:
        raise ConfigError(
            f"--measured {path}: {size:,} bytes; expected the JSON of `maskvr benchmark training-speed --output`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--measured {path}: not JSON: {error}") from None
    if not content:
        raise ConfigError(f"--measured {path}: not a result of `maskvr benchmark training-speed --output`")
    return [_measurement(one, path) for one in (content if isinstance(content, list) else [content])]


def _measurement(content: Any, path: Path) -> Measurement:
    what = _WHAT.match(str(content.get("what"))) if isinstance(content, dict) else None
    if what is None or what["preset"] not in BERT_PRESETS:
        raise ConfigError(f"--measured {path}: not a result of `maskvr benchmark training-speed --output`")
    length, micro, ranks = (int(what[key]) for key in ("length", "micro", "ranks"))
    for key, known in (("compile", "none"), ("settings", "none")):
        if (value := content.get(key, known)) != known:
            raise ConfigError(
                f"--measured {path}: measured with {key} {value}, whose effect the model does not know; measure without"
            )
    # Files of earlier versions do not have it: they measured one micro-batch per step.
    accumulation = _positive(content, "accumulation", path) if "accumulation" in content else 1
    tokens = _positive(content, "tokens_per_second_median", path)
    model = ModelConfig.model_validate({"preset": what["preset"], "max_position_embeddings": max(512, length)})
    config = read_deepspeed_config(deepspeed_config_path(what["deepspeed"]))
    return Measurement(
        path=str(path),
        device=str(content.get("device")),
        sizes=encoder_sizes(model, BENCHMARK_VOCABULARY),
        zero=zero_settings(config),
        work=Pass(length, predictions(length, BENCHMARK_RATE), micro, int(accumulation)),
        ranks=ranks,
        step_seconds=ranks * micro * accumulation * length / tokens,
        memory=_positive(content, "peak_memory_gib", path) * 2**30 if "peak_memory_gib" in content else None,
        product_rate=_positive(content, "matrix_product_tflops", path) * 1e12,
    )


def _positive(content: dict[str, Any], key: str, path: Path) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"--measured {path}: {key} is {value!r}; a number above 0 expected")
    return float(value)


def same_gpu(device: str, gpu: Gpu) -> bool:
    """Whether a device's name, as its driver has it, is that of the preset: "NVIDIA H100 80GB HBM3"."""
    words = device.upper().replace("-", " ").replace("GB", " ").split()
    return gpu.name.split("-")[0] in words and (gpu.name.split("-")[0] != "A100" or gpu.name.split()[1] in words)


def calibrate(measurements: Sequence[Measurement], gpu: Gpu) -> tuple[Gpu, Calibration]:
    """The GPU with its measured rate of matrix products, and the factors that fit the measured steps best.

    One measurement: one factor for computation and launches together. Several: one for each, by least squares of the
    logarithms, equal where the measurements do not tell them apart; and the median factor of the memory of activations.
    Raises ConfigError if a measurement is of another GPU, its time more than 20 times longer or shorter than predicted,
    or its memory none that the model could have.
    """
    for one in measurements:
        if not same_gpu(one.device, gpu):
            raise ConfigError(f"--measured {one.path}: measured on {one.device!r}, not on --gpu {gpu.name}")
    return fit(measurements, gpu)


def fit(measurements: Sequence[Measurement], gpu: Gpu) -> tuple[Gpu, Calibration]:
    """`calibrate`, of any device."""
    gpu = _with_measured_products(gpu, measurements)

    def error(calibration: Calibration) -> float:
        errors = [math.log(predicted(one, gpu, calibration) / one.step_seconds) for one in measurements]
        return sum(value**2 for value in errors) + _PRIOR * math.log(calibration.host / calibration.compute) ** 2

    def with_host(compute: float) -> tuple[float, float]:
        host = _minimum(lambda value: error(Calibration(compute, value)))
        return error(Calibration(compute, host)), host

    if len(measurements) == 1:
        both = _minimum(lambda value: error(Calibration(value, value)))
        best = Calibration(both, both)
    else:
        compute = _minimum(lambda value: with_host(value)[0])
        best = Calibration(compute, with_host(compute)[1])
    for one in measurements:
        if not 1 / _LARGEST < (ratio := predicted(one, gpu, Calibration()) / one.step_seconds) < _LARGEST:
            raise ConfigError(
                f"--measured {one.path}: {one.step_seconds:.3g} s per step is {1 / ratio:.3g} times what is predicted "
                f"for {gpu.name}; was the machine used by others?"
            )
    return gpu, replace(best, activations=_activations(measurements))


def _with_measured_products(gpu: Gpu, measurements: Sequence[Measurement]) -> Gpu:
    """The GPU with the median share of its rates that was measured; a precision without a measurement takes the
    other's."""

    def share(element: int, rate: float) -> float | None:
        found = [one.product_rate / rate for one in measurements if one.zero.element == element]
        return statistics.median(found) if found else None

    half, single = share(2, gpu.half), share(4, gpu.single)
    known = half or single
    assert known
    return replace(gpu, half_share=half or known, single_share=single or known)


def predicted(one: Measurement, gpu: Gpu, calibration: Calibration) -> float:
    """Seconds of the step that was measured."""
    cluster = Cluster(1, one.ranks, gpu, None)
    times = step_time(one.sizes, one.zero, one.work, cluster, optimizer="lamb", fused=False, calibration=calibration)
    return times.total


def _activations(measurements: Sequence[Measurement]) -> float:
    """Median factor of the activations' memory; 1 if no memory was measured.

    Raises ConfigError if a factor is not between 0 and 20.
    """
    factors = []
    for one in measurements:
        if one.memory is not None:
            expected = memory(one.sizes, one.zero, one.work, ranks=one.ranks, fused=False)
            if expected.activations:
                others = expected.total - expected.activations
                factor = (one.memory - others) / expected.activations
                if not 0 < factor < _LARGEST:
                    raise ConfigError(
                        f"--measured {one.path}: peak_memory_gib {one.memory / 2**30:.3g} leaves {factor:.3g} times "
                        f"the memory predicted for activations, after {others / 2**30:.3g} GiB of weights, gradients "
                        "and optimizer; over 0 and below 20 times expected. Measure again, with larger micro-batches"
                    )
                factors.append(factor)
    return statistics.median(factors) if factors else 1.0


def _minimum(function: Callable[[float], float]) -> float:
    """Argument in [1/20, 20] of the minimum of a unimodal function, by golden sections of its logarithm."""
    low, high, golden = -math.log(_LARGEST), math.log(_LARGEST), (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = function(math.exp(left)), function(math.exp(right))
    for _ in range(40):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = function(math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = function(math.exp(right))
    return math.exp((low + high) / 2)
