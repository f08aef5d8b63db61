"""`maskvr variance`: gradient variance due to the data and due to the masks, for each masking strategy.

N rows × R draws per row and strategy, G layers, s the sketch size, J masks of a row in one batch (1 except for
fully_explored with placement same_batch). A row's gradient is that of its Σ w ℓ, divided by the strategy's mean number
of predictions, so that a batch's mean is the gradient of the run's loss. Dropout is off, its variance in neither part.

Cost: R·J forward and backward passes per row and strategy; oracle_gradient needs one more for every prediction of its
own masks, n per round. Every rank measures N / (world size) rows. Memory in addition to the model: sketches of one
row's draws, R·J·G·s numbers, and of all rows' means, N·G·s; never a gradient of the full model.

Each row is measured separately, so the results do not depend on the number of ranks. Collectives: those of moments.py,
once per strategy, and those of opening files.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from data_pipeline.files import write_json
from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.analysis.gradient_variance.moments import APART, Measured, Sample, measure_covariance, measure_gradients
from maskvr_ds.analysis.gradient_variance.options import add_variance_options, read_seconds, with_rates
from maskvr_ds.analysis.gradient_variance.oracles import TokenOracle, gradient_norms, head_norms
from maskvr_ds.analysis.gradient_variance.progress import MINIMUM_SEQUENCES, progress_figures
from maskvr_ds.analysis.gradient_variance.random_effects import (
    Counts,
    Floats,
    Resampling,
    VarianceComponents,
    variances,
    whole_mask_variance,
)
from maskvr_ds.analysis.gradient_variance.report import plot, table
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import late_masks_of, load_model, separator_of
from maskvr_ds.config import ConfigError, MapNetConfig, MaskingConfig
from maskvr_ds.config.masking import HELD_OUT_RATE
from maskvr_ds.config.strategy_spec import HEAD_ORACLE, MASK_ORACLE, TOKEN_ORACLES, StrategySpec, parse_strategies
from maskvr_ds.data.documents import check_borders, document_lengths
from maskvr_ds.data.permutation import KeyedPermutation
from maskvr_ds.masking.checks import hidden_positions, segments, sequence_copies
from maskvr_ds.masking.factory import create_masker, create_proposer
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.rates import maximum_predictions
from maskvr_ds.masking.strategies import Proposal
from maskvr_ds.models.capabilities import check_length
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.layout import MAPNET_STATE
from maskvr_ds.runtime import distributed

RESULT, PLOT = "variance.json", "variance.png"
BASELINE = "uniform"
FIGURES = ("data", "mask", "total", "mask_over_data", "mask_ratio", "total_ratio")
# Purposes of keys, so that no two uses share random numbers.
_ROWS, _MASKS, _ORACLE, _HAMMING, _SKETCH, _BOOTSTRAP = range(6)


def figures(moments: VarianceComponents, baseline: VarianceComponents, ways: Counts) -> Floats:
    """FIGURES of every layer, then of the full gradient: float64 [C, (G + 1) · 6]."""
    (data, mask), (data_0, mask_0) = (variances(m, ways) for m in (moments, baseline))
    columns = _figures(moments.segments * data, mask, data, data_0 + mask_0, mask_0)
    return np.stack(columns, 2).reshape(len(data), -1)


def _figures(batch_data: Floats, mask: Floats, data: Floats, total_0: Floats, mask_0: Floats) -> list[Floats]:
    total = batch_data + mask
    with np.errstate(divide="ignore", invalid="ignore"):
        return [data, mask, total, mask / data, mask / mask_0, total / total_0]


def oracle_figures(baseline: VarianceComponents, ways: Counts) -> Floats:
    """FIGURES of the full gradient for the ideal proposal of complete masks: float64 [C, 6]."""
    data, mask_0 = (v[:, -1:] for v in variances(baseline, ways))
    mask = whole_mask_variance(baseline, ways)
    return np.concatenate(_figures(data, mask, data, data + mask_0, mask_0), 1)


def reduction_share(
    moments: VarianceComponents, oracle: VarianceComponents, baseline: VarianceComponents, ways: Counts
) -> Floats:
    """A proposal's reduction of the full gradient's total variance, relative to an oracle's: float64 [C, 1]."""
    own, best, uniform = (
        data[:, -1:] + mask[:, -1:] for data, mask in (variances(m, ways) for m in (moments, oracle, baseline))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return (uniform - own) / (uniform - best)


def _named(names: Sequence[str], resampling: Resampling, figure: Callable[[Counts], Floats]) -> dict[str, Any]:
    """Layer → figure → [estimate, low, high]; None if non-finite (division by zero)."""
    values = resampling.interval(figure)
    lists = [[x if np.isfinite(x) else None for x in value] for value in values]
    of_layers = [lists[i : i + len(FIGURES)] for i in range(0, len(lists), len(FIGURES))]
    return {name: dict(zip(FIGURES, layer, strict=True)) for name, layer in zip(names, of_layers, strict=True)}


class Measurement:
    """A checkpoint's model, the sample of rows, and the maskers and proposals to measure."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        device = distributed.device()
        self.folder = distributed.run_on_rank0(lambda: checkpoints.newest(Path(arguments.checkpoint)))
        distributed.run_on_rank0(lambda: checkpoints.verify(self.folder))
        self.state = distributed.run_collectively(lambda: checkpoints.read_state(self.folder))
        corpus = distributed.run_collectively(lambda: self._open(Path(arguments.corpus)))
        rows = KeyedPermutation(corpus.rows, self._key(_ROWS))(np.arange(arguments.sequences))
        mlm = distributed.run_collectively(lambda: load_model(self.folder))
        self.model = MaskedLanguageModel(mlm, separator=separator_of(self.state), late=late_masks_of(self.state))
        # For token types; the gradient measured is that of the masked tokens.
        pairs = self.model.has_pair_head and "pair_label" in corpus.manifest.columns
        self.sample = Sample(corpus, rows, arguments.seed, arguments.micro_size, device, pairs)
        distributed.run_collectively(lambda: check_length(self.model, corpus.sequence_length))
        self.sketcher = Sketcher(self.model.to(device), size=arguments.sketch_size, seed=self._key(_SKETCH))
        # Rate and corruption are those that the run was trained with.
        trained = self.state.identity["masking"]
        self.common = {key: trained[key] for key in ("rate", "mask_probability", "random_probability")}

    def _key(self, purpose: int) -> int:
        return hashing.fold(self.arguments.seed, purpose)

    def _open(self, path: Path) -> Corpus:
        corpus, arguments = Corpus(path), self.arguments
        if (theirs := corpus.manifest.tokenizer_sha256) != (ours := self.state.identity["tokenizer"]):
            raise ConfigError(f"{path}: tokenizer {theirs[:12]} differs from {ours[:12]} of {self.folder}")
        if separator_of(self.state) is not None:
            check_borders(corpus)
        if arguments.sequences > corpus.rows:
            raise ConfigError(f"--sequences {arguments.sequences}: {path} has {corpus.rows} rows")
        for name, minimum in (("masks", 2), ("oracle_rounds", 1), ("micro_size", 1)):
            if (value := getattr(arguments, name)) < minimum:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
        if arguments.hamming_rounds not in range(2, 1 << 20) and arguments.hamming_rounds != 0:
            raise ConfigError(f"--hamming-rounds {arguments.hamming_rounds}: must be 0 (off) or at least 2")
        if not 0 < arguments.confidence < 1:
            raise ConfigError(f"--confidence {arguments.confidence}: must lie between 0 and 1, both excluded")
        return corpus

    def copies(self, spec: StrategySpec) -> int:
        """J. Raises ConfigError if rows have fewer segments."""
        masking, corpus = spec.masking(self.common), self.sample.corpus
        copies, most = sequence_copies(masking, corpus), segments(corpus.sequence_length - 2, masking.rate)
        if copies > most:
            raise ConfigError(f"{spec.text}: a sequence of {corpus.sequence_length} tokens has only {most} segments")
        if self.arguments.masks * copies * APART >= 1 << 23:
            raise ConfigError(
                f"--masks {self.arguments.masks}: must be at most {(1 << 23) // (copies * APART)} for {spec.text}"
            )
        return copies

    def masker(self, masking: MaskingConfig, purpose: int, proposal: Proposal | None = None) -> Masker:
        """A masker with its own random numbers for `purpose`. Collective: call on all ranks."""
        seed = self._key(purpose)
        return create_masker(masking, self.sample.corpus, seed=seed, device=self.sample.device, proposal=proposal)

    def check(self, specs: Sequence[StrategySpec]) -> None:
        """Raise ConfigError if a strategy cannot be measured on this checkpoint and corpus."""
        for spec in specs:
            self.copies(spec)
            if spec.strategy == "mapnet" and not (self.folder / MAPNET_STATE).is_file():
                raise ConfigError(
                    f"{spec.text}: {self.folder} has no {MAPNET_STATE}; train with masking.strategy=mapnet (and "
                    "masking.mapnet.gate=never to keep masks uniform)"
                )

    def _mapnet(self) -> tuple[MapNetConfig, dict[str, torch.Tensor] | None]:
        """The run's config section and the network's state; default and None if the checkpoint has no network."""
        file = self.folder / MAPNET_STATE
        if not file.is_file():
            return MapNetConfig(), None
        with safe_open(file, "pt") as content:
            section = MapNetConfig.model_validate_json(content.metadata()["mapnet"])
        return section, load.read_extra(self.folder, MAPNET_STATE)

    def floor(self, spec: StrategySpec) -> float:
        """λ of MAPNet or of a token oracle. Collective: call on all ranks."""
        return spec.masking(self.common, distributed.run_collectively(self._mapnet)[0]).mapnet.floor

    def oracle(self, spec: StrategySpec) -> TokenOracle | None:
        """The strategy's token oracle, or None. Collective: call on all ranks."""
        if spec.strategy not in TOKEN_ORACLES:
            return None
        head = spec.strategy == HEAD_ORACLE
        return TokenOracle(
            head_norms(self.model) if head else gradient_norms(self.sketcher, self.sample.micro_size),
            self.masker(MaskingConfig.model_validate({**self.common, "strategy": "fully_explored"}), _ORACLE),
            rounds=self.arguments.oracle_rounds,
            floor=self.floor(spec),
        )

    def network(self, spec: StrategySpec) -> Proposer | None:
        """The checkpoint's MAPNet if the strategy is mapnet, else None. Collective: call on all ranks."""
        if spec.strategy != "mapnet":
            return None
        trained, tensors = distributed.run_collectively(self._mapnet)
        assert tensors is not None
        floor = spec.masking(self.common, trained).mapnet.floor
        mapnet = trained.model_copy(update={"floor": floor, "gate": "always"})
        proposer = create_proposer(mapnet, self.sample.corpus, self.model.mlm.config, seed=0)
        proposer.learning = False
        distributed.run_collectively(lambda: proposer.load(tensors))
        return proposer

    def rate(self, spec: StrategySpec) -> float:
        """The rate at which a strategy is measured."""
        return spec.masking(self.common).rate

    @property
    def global_size(self) -> int:
        """B."""
        return self.arguments.global_size or self.state.identity["batch.global_size"]

    def goal(self) -> Measured:
        """Gradients of uniform masks at the held-out rate. Collective: call on all ranks."""
        masking = MaskingConfig.model_validate({**self.common, "rate": HELD_OUT_RATE})
        masker = self.masker(masking, _MASKS)
        return measure_gradients(self.sample, self.sketcher, masker, draws=self.arguments.masks, copies=1)

    def flops(self, spec: StrategySpec) -> float:
        """FLOPs of a step per sequence at the strategy's rate, without those of drawing masks."""
        corpus, L = self.sample.corpus, self.sample.corpus.sequence_length
        K, size = maximum_predictions(L, self.rate(spec)), self.sample.micro_size
        documents = None if self.model.separator is None else document_lengths(corpus)
        late = late_masks_of(self.state, hidden_positions(spec.masking(self.common), L))
        return flops_per_sequence(self.model.mlm.config, L, K, batch=size, documents=documents, late=late)

    def progress(
        self, moments: VarianceComponents, baseline: VarianceComponents, goal: VarianceComponents, *, cost: float
    ) -> dict[str, Any]:
        """A strategy's `cost` of a step, relative to the baseline's, and its progress."""
        options = {"batch": self.global_size, "cost": cost, "level": self.arguments.confidence}
        return {"cost": cost, "progress": progress_figures(moments, baseline, goal, **options)}

    def strategy(self, spec: StrategySpec, goal: torch.Tensor | None) -> tuple[VarianceComponents, dict[str, Any]]:
        """Measure a strategy: its variance components and the cost of measuring. Collective: call on all ranks."""
        draws, copies, start = self.arguments.masks, self.copies(spec), time.perf_counter()
        oracle = self.oracle(spec)
        proposer = oracle or self.network(spec)
        masking = spec.masking(self.common, proposer.config if isinstance(proposer, Proposer) else None)
        masker = self.masker(masking, _MASKS, None if proposer is None else proposer.propose)
        found = measure_gradients(self.sample, self.sketcher, masker, draws=draws, copies=copies, goal=goal)
        oracle_passes = torch.tensor([0 if oracle is None else oracle.predictions])
        head_only = spec.strategy == HEAD_ORACLE
        cost = {
            "segments": copies,
            "rate": self.rate(spec),
            "predictions": found.predictions,
            "passes": len(self.sample.rows) * draws * copies,
            "oracle_passes": 0 if head_only else int(distributed.all_reduce_sum(oracle_passes.to(self.sample.device))),
            "seconds": round(time.perf_counter() - start, 2),
        }
        return found.moments, cost


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all strategies and write the results; → the content of variance.json.

    Collective: call on all ranks, after `distributed.initialize`.
    """
    texts = with_rates(arguments.strategies, arguments.rates)
    specs = distributed.run_collectively(lambda: parse_strategies(texts, first=BASELINE))
    names_measured = [spec.text for spec in specs if spec.strategy != MASK_ORACLE]
    seconds = distributed.run_collectively(lambda: read_seconds(arguments.seconds, names_measured))
    measurement = Measurement(arguments)
    # Report errors in any strategy before the first measurement.
    distributed.run_collectively(lambda: measurement.check(specs))
    resampling = distributed.run_collectively(
        lambda: Resampling(
            arguments.sequences, seed=hashing.fold(arguments.seed, _BOOTSTRAP), level=arguments.confidence
        )
    )
    names = [*measurement.sketcher.layers, "whole"]
    baseline: VarianceComponents | None = None
    strategies: dict[str, Any] = {}
    goal = measurement.goal() if arguments.sequences >= MINIMUM_SEQUENCES else None
    unit: float | None = None
    # (strategy, floor) → components, of MAPNet and of the oracle that knows its target.
    proposals: dict[tuple[str, float], VarianceComponents] = {}
    for spec in specs:
        if spec.strategy == MASK_ORACLE:
            assert baseline is not None
            result: dict[str, Any] = {"layers": _named(["whole"], resampling, partial(oracle_figures, baseline))}
        else:
            moments, cost = measurement.strategy(spec, None if goal is None else goal.means)
            baseline = baseline or moments
            if spec.strategy in ("mapnet", HEAD_ORACLE):
                proposals[spec.strategy, measurement.floor(spec)] = moments
            layers = _named(names, resampling, partial(figures, moments, baseline))
            result = {
                **cost,
                "median_mask": float(np.median(moments.within.sum(1)) * moments.segments),
                "layers": layers,
            }
            if goal is not None:
                spent = seconds.get(spec.text) or measurement.flops(spec)
                unit = unit or spent
                result |= measurement.progress(moments, baseline, goal.moments, cost=spent / unit)
        strategies[spec.text] = result
        _print_rank0(f"{spec.text}: {result.get('passes', 0)} passes, {result.get('seconds', 0):g} s")
    shares = _shares(proposals, baseline, resampling)
    report = {
        "checkpoint": str(arguments.checkpoint),
        "step": measurement.state.step,
        "corpus": str(arguments.corpus),
        "masking": measurement.common,
        "global_size": measurement.global_size,
        "cost_unit": "seconds" if seconds else "FLOPs",
        "sequences": arguments.sequences,
        "masks": arguments.masks,
        "oracle_rounds": arguments.oracle_rounds,
        "seed": arguments.seed,
        "confidence": arguments.confidence,
        "sketch_size": measurement.sketcher.size,
        "parameters": sum(p.numel() for p in measurement.model.parameters()),
        "ranks": distributed.world_size(),
        "strategies": strategies,
        # Floor → MAPNet's reduction of the total variance relative to oracle_head's.
        "mapnet_of_oracle_head": shares,
    }
    if arguments.hamming_rounds:
        report["hamming_rounds"] = arguments.hamming_rounds
        report["hamming"] = measure_covariance(
            measurement.sample,
            measurement.sketcher,
            measurement.masker(MaskingConfig.model_validate(measurement.common), _HAMMING),
            arguments.hamming_rounds,
            resampling,
        )
    report["peak_memory_bytes"] = _peak_memory(measurement.sample.device)
    distributed.run_on_rank0(lambda: _write(report, Path(arguments.output)))
    _print_rank0(table(report))
    return report


def _shares(
    proposals: dict[tuple[str, float], VarianceComponents], baseline: VarianceComponents | None, resampling: Resampling
) -> dict[str, list[float | None]]:
    """Floor → MAPNet's reduction of the total variance relative to oracle_head's."""
    shares: dict[str, list[float | None]] = {}
    for (strategy, floor), moments in proposals.items():
        if strategy == "mapnet" and baseline and (oracle := proposals.get((HEAD_ORACLE, floor))):
            (interval,) = resampling.interval(partial(reduction_share, moments, oracle, baseline))
            shares[f"{floor:g}"] = [x if np.isfinite(x) else None for x in interval]
    return shares


def _peak_memory(device: torch.device) -> int:
    """Peak memory of this rank in bytes: of its GPU, or of the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    plot(report, output / PLOT)
    write_json(output / RESULT, report)


def _print_rank0(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of each rank. Returns the exit status: 0 completed, 1 error."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvr_ds.analysis.gradient_variance.measure", description="One rank of `maskvr variance`."
    )
    add_variance_options(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    def measure_and_write() -> None:
        run(arguments)

    return distributed.run_as_rank(measure_and_write)


if __name__ == "__main__":
    sys.exit(main())
