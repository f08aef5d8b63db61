"""Measurement of the variance components of single rows' gradients under a strategy's masks, rows split over ranks.

N rows × R draws of J masks each, G layers, s the sketch size, W windows (mask_covariance.py). Collectives, over the
world group, once per call: `measure` all-reduces float32 [N, G, s], float64 [N, 2 G + 1] and int64 [N],
`measure_covariance` float64 [N, 2 W].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.mask_covariance import WINDOWS, covariances, shifts, windows
from maskvr_ds.analysis.gradient_variance.random_effects import Counts, Floats, Resampling, VarianceComponents
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.masking.checks import segments
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.strategies import prediction_counts
from maskvr_ds.runtime import distributed

# Draws of a row are this many epochs (times J) apart: each belongs to a different round of fully_explored, and the
# first segment of a draw varies, as in training.
APART = 1021


@dataclass(frozen=True)
class Sample:
    """The rows on which all strategies are measured. rows: int64 [N], row numbers. seed: of the measurement. pairs:
    whether the model takes token types."""

    corpus: Corpus
    rows: np.ndarray
    seed: int
    micro_size: int
    device: torch.device
    pairs: bool = False

    def mine(self) -> range:
        """This rank's share of 0 … N − 1."""
        return range(distributed.rank(), len(self.rows), distributed.world_size())

    def repeated(self, number: int, epochs: np.ndarray) -> TokenBatch:
        """A batch of copies of row `number`, one for each of `epochs` int64 [·]."""
        rows = np.full_like(epochs, self.rows[number])
        return to_device(read_rows(self.corpus, rows, epochs, pairs=self.pairs), self.device)

    def segments(self, masker: Masker, number: int) -> int:
        """S: number of segments of row `number` for fully_explored."""
        n = int(masker.maskable(self.repeated(number, np.zeros(1, dtype=np.int64))).sum())
        return max(1, segments(n, masker.rate))

    def sketches(self, sketcher: Sketcher, masker: Masker, number: int, epochs: np.ndarray) -> tuple[torch.Tensor, int]:
        """Gradient sketches of a row's masks, float32 [len(epochs), G, s], and their total number of predictions."""
        masked = masker(self.repeated(number, epochs))
        sketches = torch.cat([sketcher(part) for part in masked.split(self.micro_size)])
        return sketches, int((masked.weights != 0).sum())


@dataclass(frozen=True)
class Measured:
    """Result of `measure_gradients`, identical on all ranks.

    moments: of the gradients per prediction; `cross` with those of `goal`, if given. single: variance of single masks,
    float64 [N, G], from the same passes: the variance over draws (each from a different round) that copies = 1 would
    have, averaged over the copies. predictions: per mask. means: of the rows' gradients, float64 [N, G · s].
    """

    moments: VarianceComponents
    single: Floats
    predictions: float
    means: torch.Tensor


def measure(
    sample: Sample, sketcher: Sketcher, masker: Masker, *, draws: int, copies: int
) -> tuple[VarianceComponents, float]:
    """Variance components of the gradients per prediction, and predictions per mask, identical on all ranks.

    Collective: call on all ranks.
    """
    found = measure_gradients(sample, sketcher, masker, draws=draws, copies=copies)
    return found.moments, found.predictions


def measure_segments(
    sample: Sample, sketcher: Sketcher, masker: Masker, *, draws: int, copies: int, one_round: bool = False
) -> tuple[VarianceComponents, Floats, float]:
    """As `measure`; the second result is `Measured.single`. Collective: call on all ranks."""
    found = measure_gradients(sample, sketcher, masker, draws=draws, copies=copies, one_round=one_round)
    return found.moments, found.single, found.predictions


def measure_gradients(
    sample: Sample,
    sketcher: Sketcher,
    masker: Masker,
    *,
    draws: int,
    copies: int,
    one_round: bool = False,
    goal: torch.Tensor | None = None,
) -> Measured:
    """Measure the gradients of the sample's rows under R draws of J masks. Collective: call on all ranks.

    one_round: whether the copies of a draw are the first segments of one round of fully_explored; otherwise they vary
    as in training, where some draws start with the last segments of a round and end with the first of the next.
    goal: `Measured.means` of other masks on the same rows.
    """
    N, G = len(sample.rows), len(sketcher.layers)
    means = torch.zeros((N, G, sketcher.size), device=sample.device)
    spread = torch.zeros((N, 2 * G + 1), dtype=torch.float64, device=sample.device)
    predictions = torch.zeros(N, dtype=torch.int64, device=sample.device)
    for number in sample.mine():
        apart = APART * (sample.segments(masker, number) if one_round else copies)
        epochs = (np.arange(draws)[:, None] * apart + np.arange(copies)).ravel()
        sketches, count = sample.sketches(sketcher, masker, number, epochs)
        single = sketches.view(draws, copies, G, -1)
        spread[number, G + 1 :] = (single - single.mean(0)).double().square().sum((0, 1, 3)) / (copies * (draws - 1))
        of_draws = single.mean(1)
        means[number] = of_draws.mean(0)
        deviation = (of_draws - means[number]).double().square().sum((0, 2)) / (draws - 1)
        spread[number, :G] = deviation
        spread[number, G] = of_draws.double().square().sum((1, 2)).sqrt().var()
        predictions[number] = count
    for total in (means, spread, predictions):
        distributed.all_reduce_sum(total)
    of_rows = predictions.cpu().double().numpy() / (draws * copies)
    a_mask = float(of_rows.mean())
    if not a_mask:
        raise ValueError("no row of the sample has a maskable token; measure on more --sequences")
    scaled = means.cpu().double() / a_mask
    of_layers, flat = scaled.transpose(0, 1), scaled.flatten(1)
    numbers = spread.cpu().numpy() / a_mask**2
    moments = VarianceComponents(
        within=numbers[:, :G],
        gram=torch.stack([layer @ layer.T for layer in of_layers]).numpy(),
        norm_variance=numbers[:, G],
        draws=draws,
        segments=copies,
        sizes=of_rows / a_mask,
        cross=None if goal is None else (flat @ goal.T).numpy(),
    )
    return Measured(moments, numbers[:, G + 1 :], a_mask, flat)


def measure_covariance(
    sample: Sample, sketcher: Sketcher, masker: Masker, rounds: int, resampling: Resampling
) -> list[dict[str, Any]]:
    """Correlation of the gradients of two masks of a row by their Hamming distance: a list of
    {"distance", "correlation": [estimate, low, high]}. Collective: call on all ranks."""
    masker.strategy = windows
    results = torch.zeros((len(sample.rows), 2 * WINDOWS), dtype=torch.float64, device=sample.device)
    number_of_window = torch.arange(WINDOWS, device=sample.device)
    for number in sample.mine():
        sketches, _ = sample.sketches(sketcher, masker, number, np.arange(rounds * WINDOWS))
        results[number, :WINDOWS] = covariances(sketches.view(rounds, WINDOWS, len(sketcher.layers), -1))
        n = masker.maskable(sample.repeated(number, np.zeros(1, dtype=np.int64))).sum(1)
        results[number, WINDOWS:] = 2 * shifts(n, prediction_counts(n, masker.rate), number_of_window)
    values = distributed.all_reduce_sum(results).cpu().numpy()

    def correlation(ways: Counts) -> Floats:
        covariance = ways.counts @ values[:, :WINDOWS]
        return covariance[:, 1:] / covariance[:, :1]

    return [
        {"distance": float(distance), "correlation": list(interval)}
        for distance, interval in zip(values[:, WINDOWS + 1 :].mean(0), resampling.interval(correlation), strict=True)
    ]
