"""`maskvr health RUN --at CHECKPOINT`: findings at a checkpoint, on a few rows of a corpus.

The model is an fp32 copy on one device, whatever ZeRO stage wrote the checkpoint. One process; within the project, call
after `distributed.initialize`.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from data_pipeline.shards import HELD_OUT, Corpus
from maskvr_ds.analysis.gradient_variance.moments import Sample, measure
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.analysis.health.checks import CHECKS, Finding, Status
from maskvr_ds.analysis.health.noise import NoiseScale, noise_scale
from maskvr_ds.analysis.health.probe import (
    Signals,
    copy_for_analysis,
    mean_loss,
    measure_signals,
    norm_gains,
)
from maskvr_ds.analysis.health.spectra import (
    Largest,
    hessian_product,
    largest_eigenvalue,
    largest_singular_value,
    stable_rank,
)
from maskvr_ds.analysis.health.update import relative_updates
from maskvr_ds.checkpoint.export import load_model, separator_of
from maskvr_ds.config import ConfigError
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.data.permutation import KeyedPermutation
from maskvr_ds.data.vocabulary import token_counts
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.capabilities import check_length
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState

_SEED, _SKETCH_SIZE, _DRAWS = 0, 4001, 2
_SMALLEST_MATRIX = 16
_GROUPS = 10


@dataclass
class Measurements:
    """What `judge_checkpoint` judges; attributes are None where they were not measured, with the reason in `missing`.

    signals: by layer. updates: relative update by tensor. matrices: σ_max and stable rank by tensor. gains: of norms.
    embeddings: median norm of the embedding rows by token frequency, from the rarest tenth of the tokens in the corpus.
    silent: ids of tokens of the corpus whose row has nearly no norm. sharpness: λ_max; a lower bound unless converged.
    noise: gradient noise scale.
    """

    signals: Signals
    matrices: dict[str, tuple[float, float]]
    gains: dict[str, tuple[float, float]]
    embeddings: list[float]
    silent: list[int]
    lr: float | None
    global_size: int | None
    sharpness: float | None = None
    converged: bool = True
    updates: dict[str, float] | None = None
    noise: NoiseScale | None = None
    missing: dict[str, str] | None = None

    def dump(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def find_checkpoint(run: Path, at: str) -> Path:
    """The checkpoint that `at` names: a folder, a step, or "newest". Raises CheckpointError if there is none."""
    if at == "newest":
        return checkpoints.newest(run)
    if at.isdigit():
        steps = {checkpoints.step_of(folder): folder for folder in checkpoints.complete_checkpoints(run)}
        if int(at) not in steps:
            raise CheckpointError(
                f"{run}: no complete checkpoint of step {at}; there are those of {', '.join(map(str, steps)) or 'none'}"
            )
        return steps[int(at)]
    return checkpoints.newest(Path(at))


def open_corpus(path: Path, state: CheckpointState, folder: Path) -> Corpus:
    """The held-out part of a corpus, or the corpus. Raises ConfigError if its tokenizer is not the run's."""
    corpus = Corpus(path / HELD_OUT if (path / HELD_OUT).is_dir() else path)
    if (theirs := corpus.manifest.tokenizer_sha256) != (ours := state.identity["tokenizer"]):
        raise ConfigError(f"{path}: tokenizer {theirs[:12]} differs from {ours[:12]} of {folder}")
    return corpus


def measure_checkpoint(folder: Path, corpus_folder: Path, *, rows: int, lr: float | None) -> Measurements:
    """Load a checkpoint and measure it on `rows` rows. lr: learning rate of its step, for updates and sharpness.

    Raises CheckpointError for a checkpoint that is damaged or not finite, ConfigError for a corpus that does not fit,
    ValueError for an architecture without eager attention.
    """
    checkpoints.verify(folder)
    state = checkpoints.read_state(folder)
    if separator_of(state) is not None:
        raise ConfigError(
            f"{folder}: was trained with data.attention documents, and the analysis of attention reads complete rows; "
            "judge the records of its run, without --at"
        )
    corpus = open_corpus(corpus_folder, state, folder)
    model = copy_for_analysis(_finite(load_model(folder), folder))
    check_length(model, corpus.sequence_length)
    found = measure_model(model, corpus, rows=rows, seed=state.step)
    found.lr, found.global_size = lr, state.identity.get("batch.global_size")
    missing = found.missing or {}
    if lr is None:
        missing["update to weight"] = "the learning rate of its step is not recorded"
    elif state.identity["optimizer"]["name"] == "stable_adamw":
        missing["update to weight"] = "StableAdamW clips by gradients that no checkpoint stores"
    else:
        try:
            found.updates = relative_updates(folder, state, lr)
        except CheckpointError as error:
            missing["update to weight"] = str(error)
    found.missing = missing
    return found


def _finite(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Checks would compare NaN with thresholds, and call it ok."""
    if bad := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
        raise CheckpointError(
            f"{folder}: {len(bad)} tensors have values that are not finite ({', '.join(bad[:3])}): it is damaged; "
            "judge an earlier checkpoint"
        )
    return model


def measure_model(model: MaskedLanguageModel, corpus: Corpus, *, rows: int, seed: int = 0) -> Measurements:
    """Measure a model from `copy_for_analysis` on `rows` rows of a corpus, chosen by the seed."""
    rows = min(rows, corpus.rows)
    chosen = KeyedPermutation(corpus.rows, seed)(np.arange(rows))
    device = next(model.parameters()).device
    masker = Masker.for_corpus(corpus.manifest, seed=seed, device=device)
    pairs = model.has_pair_head and "pair_label" in corpus.manifest.columns
    masked = masker(to_device(read_rows(corpus, chosen, np.zeros_like(chosen), pairs=pairs), device))
    counts = token_counts(corpus, range(len(corpus.manifest.shards)), of_passages=False)[0]
    embeddings, silent = _embedding_rows(model, counts)
    largest = sharpness(model, masked)
    found = Measurements(
        signals=measure_signals(model, masked),
        matrices=_matrices(model),
        gains=norm_gains(model),
        embeddings=embeddings,
        silent=silent,
        lr=None,
        global_size=None,
        sharpness=largest.value,
        converged=largest.converged,
        missing={},
    )
    assert found.missing is not None
    if rows < 3:
        found.missing["gradient noise"] = f"{rows} rows: at least 3 are needed"
        return found
    try:
        sketcher = Sketcher(copy.deepcopy(model), size=_SKETCH_SIZE, seed=seed)
        sample = Sample(corpus, chosen, seed, 8, device, pairs)
        found.noise = noise_scale(measure(sample, sketcher, masker, draws=_DRAWS, copies=1)[0])
    except ValueError as error:
        found.missing["gradient noise"] = str(error)
    return found


def sharpness(model: MaskedLanguageModel, masked: MaskedBatch) -> Largest:
    """λ_max of the mean loss' Hessian in all parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    product = hessian_product(lambda: mean_loss(model, masked), parameters)
    return largest_eigenvalue(product, [p.detach() for p in parameters], tolerance=1e-3, iterations=40)


@torch.no_grad()
def _matrices(model: MaskedLanguageModel) -> dict[str, tuple[float, float]]:
    found = {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and min(p.shape) >= _SMALLEST_MATRIX:
            sigma = largest_singular_value(p.detach())
            found[name] = (sigma, stable_rank(p.detach(), sigma))
    return found


@torch.no_grad()
def _embedding_rows(model: MaskedLanguageModel, counts: np.ndarray) -> tuple[list[float], list[int]]:
    """Median norms by tenths of the tokens that occur, from the rarest; ids of those with nearly no norm."""
    norms = model.mlm.get_input_embeddings().weight.detach().float().norm(dim=1).cpu().numpy()[: len(counts)]
    seen = np.flatnonzero(counts[: len(norms)])
    if not len(seen):
        return [], []
    ordered = seen[np.argsort(counts[seen], kind="stable")]
    groups = [float(np.median(norms[part])) for part in np.array_split(ordered, _GROUPS) if len(part)]
    limit = CHECKS["embedding rows"].thresholds["share_of_median"] * np.median(norms[seen])
    return groups, [int(i) for i in ordered[::-1] if norms[i] <= limit]


def judge_checkpoint(found: Measurements) -> list[Finding]:
    """One answer per check of a checkpoint."""
    s, missing = found.signals, found.missing or {}
    rms = [j.rms for j in s.jacobians]
    findings = [
        *(_over_depth("activations over depth", s.activation), _over_depth("gradients over depth", s.gradient)),
        _bounds("layer Jacobians", min(rms), max(rms), "rms singular value {:.3g} to {:.3g}", layers=_ends(rms)),
        _updates(found, missing),
        _above("attention logits", max(s.logit, default=None), "at most {:.3g}", "no attention was seen"),
        _entropy(s),
        _above("dead units", max(s.dead, default=None), "at most {:.1%} of a layer", "no feed-forward part was seen"),
        _gains(found),
        _rows(found),
        _ranks(found),
        _sharpness(found),
        _noise(found, missing),
    ]
    return findings


def _finding(name: str, bad: bool, text: str, **values: Any) -> Finding:
    status: Status = "finding" if bad else "ok"
    return Finding(name, status, text, values=values)


def _limit(name: str, key: str) -> float:
    return CHECKS[name].thresholds[key]


def _ends(values: Sequence[float]) -> list[int]:
    return [int(np.argmin(values)), int(np.argmax(values))]


def _over_depth(name: str, values: list[float]) -> Finding:
    if len(values) < 2:
        return Finding(name, "not judged", "one layer has no depth")
    low, high = min(values), max(values)
    factor = high / low if low > 0 else math.inf
    smallest, largest = _ends(values)
    text = f"× {factor:.3g}: {low:.3g} at layer {smallest}, {high:.3g} at layer {largest}"
    return _finding(name, not factor <= _limit(name, "factor"), text, factor=factor, by_layer=values)


def _bounds(name: str, low: float, high: float, text: str, **values: Any) -> Finding:
    bad = not (_limit(name, "low") <= low and high <= _limit(name, "high"))
    return _finding(name, bad, text.format(low, high), low=low, high=high, **values)


def _above(name: str, value: float | None, text: str, absent: str) -> Finding:
    (limit,) = CHECKS[name].thresholds.values()
    if value is None:
        return Finding(name, "not judged", absent)
    return _finding(name, not value <= limit, text.format(value), value=value)


def _updates(found: Measurements, missing: dict[str, str]) -> Finding:
    name = "update to weight"
    if found.updates is None:
        return Finding(name, "not judged", missing.get(name, "only a run's checkpoint has updates"))
    matrices = {n: u for n, u in found.updates.items() if n in found.matrices} or found.updates
    median = float(np.median(list(matrices.values())))
    largest = max(matrices, key=lambda n: matrices[n])
    text = f"{median:.3g} in the median, at most {matrices[largest]:.3g} ({largest})"
    bad = not _limit(name, "low") <= median <= _limit(name, "high")
    return _finding(name, bad, text, median=median)


def _entropy(s: Signals) -> Finding:
    name = "attention entropy"
    if not s.entropy:
        return Finding(name, "not judged", "no attention was seen")
    means = [float(np.mean(heads)) for heads in s.entropy]
    lowest = int(np.argmin(means))
    text = f"at least {means[lowest]:.2f} of uniform (layer {lowest})"
    return _finding(name, not means[lowest] >= _limit(name, "smallest"), text, by_layer=means)


def _gains(found: Measurements) -> Finding:
    name = "normalisation gains"
    if not found.gains:
        return Finding(name, "not judged", "the architecture has no LayerNorm or RMSNorm with gains")
    top = max(found.gains, key=lambda n: found.gains[n][0])
    low = min(found.gains, key=lambda n: found.gains[n][1])
    high, small = found.gains[top][0], found.gains[low][1]
    text = f"at most {high:.3g} ({top}), RMS at least {small:.3g} ({low})"
    return _finding(name, high > _limit(name, "largest") or small < _limit(name, "smallest"), text)


def _rows(found: Measurements) -> Finding:
    name = "embedding rows"
    shown = ", ".join(map(str, found.silent[:5])) + (" …" if len(found.silent) > 5 else "")
    groups = " ".join(f"{norm:.3g}" for norm in found.embeddings)
    text = f"{len(found.silent)} without norm ({shown})" if found.silent else "none without norm"
    text += f"; median norms from the rarest tenth to the most frequent: {groups}"
    return _finding(name, bool(found.silent), text, tokens=found.silent)


def _ranks(found: Measurements) -> Finding:
    name = "stable rank"
    if not found.matrices:
        return Finding(name, "not judged", f"no matrix has {_SMALLEST_MATRIX} rows and columns")
    lowest = min(found.matrices, key=lambda n: found.matrices[n][1])
    largest = max(found.matrices, key=lambda n: found.matrices[n][0])
    rank = found.matrices[lowest][1]
    text = f"at least {rank:.3g} ({lowest}); largest σ {found.matrices[largest][0]:.3g} ({largest})"
    return _finding(name, rank < _limit(name, "smallest"), text, smallest=rank)


def _sharpness(found: Measurements) -> Finding:
    name = "sharpness"
    if found.sharpness is None:
        return Finding(name, "not judged", "not measured")
    of_lr = "" if found.lr is None else f", lr · λ_max {found.lr * found.sharpness:.3g}"
    values = {"lambda_max": found.sharpness, "lr": found.lr, "converged": found.converged}
    bound = "" if found.converged else "≥ "  # Lanczos approaches it from below
    text = f"λ_max {bound}{found.sharpness:.3g}{of_lr}: for comparison, no threshold"
    return Finding(name, "not judged", text, (), values)


def _noise(found: Measurements, missing: dict[str, str]) -> Finding:
    name = "gradient noise"
    if found.noise is None:
        return Finding(name, "not judged", missing.get(name, "not measured"))
    values = asdict(found.noise)
    if not math.isfinite(found.noise.scale):
        return Finding(name, "not judged", "too few rows to see the mean gradient: more --rows", values=values)
    text = f"critical batch about {found.noise.scale:,.3g} sequences"
    if found.global_size is None:
        return Finding(name, "not judged", text, values=values)
    bad = found.global_size > _limit(name, "factor") * found.noise.scale
    return _finding(name, bad, f"{text}, global batch {found.global_size:,}", **values)
