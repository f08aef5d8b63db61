"""Batch normalisation against population normalisation with gamma decay, for one unit (Luo et al. 2019, equation 3).

    python docs/experiments/batch_norm_decomposition.py --output DIR

A unit g(γ ĥ + β) on a normal input h, in the paper's setting: the loss is A(a) − y a for the input a of the unit, g =
A', and labels have the mean that the unit predicts with the population's statistics. Linear: A = a²/2. ReLU: A =
max(a, 0)²/2. The expected loss with the statistics of batches of M samples, minus that with the population's, is
computed by quadrature, not sampled: for normal inputs the standardised samples of a batch are independent of its mean
and variance (Basu), so that two integrals remain. `sampled` is the same by drawing batches, through the module that
training uses. Writes DIR/decomposition.json and decomposition.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskvr_ds.models.normalization import BatchNorm, Places, gamma_decay

GAIN, SHIFT = 1.0, 0.5
SIZES = (8, 16, 32, 64, 128, 256, 512)
UNITS = ("linear", "relu")
_NODES, _WIDTH = 300, 11.0
Floats = NDArray[np.float64]


def differences(unit: str, sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Expected loss of batch normalisation minus that of population normalisation, without and with gamma decay, for
    each batch size M."""
    alone = np.array([_excess(unit, int(size)) for size in sizes])
    return alone, alone - np.array([zeta(unit, int(size)) * GAIN**2 for size in sizes])


def zeta(unit: str, batch: int) -> float:
    """ζ for a normal input, whose excess kurtosis is 0."""
    if unit == "linear":
        return gamma_decay(0.0, batch, 1.0, 1.0)
    c = SHIFT / GAIN
    positive, density = 0.5 * (1 + math.erf(c / math.sqrt(2))), math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return gamma_decay(0.0, batch, positive - c * density, positive)


def _excess(unit: str, batch: int) -> float:
    u, of_u = _standardised(batch)
    s, of_s = _deviation(batch)
    a = torch.from_numpy(GAIN * u + SHIFT)[:, None]
    # Given u and s, the input with the population's statistics is normal: that of the batch's mean.
    mean, deviation = GAIN * torch.from_numpy(u[:, None] * s) + SHIFT, GAIN / math.sqrt(batch)
    if unit == "linear":
        loss = 0.5 * ((a - mean).square() + deviation**2)
    else:
        ratio = mean / deviation
        below, density = torch.special.ndtr(ratio), torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
        first = mean * below + deviation * density
        second = (mean.square() + deviation**2) * below + mean * deviation * density
        loss = 0.5 * a.clamp(min=0).square() + 0.5 * second - first * a
    return float(of_u @ loss.numpy() @ of_s)


def _standardised(batch: int) -> tuple[Floats, Floats]:
    """Nodes and weights for u = (h − mean of its batch) / deviation of its batch; split where the ReLU has its kink."""
    end = min(math.sqrt(batch - 1), _WIDTH)
    kink = -SHIFT / GAIN
    parts = [_nodes(-end, kink), _nodes(kink, end)]
    u = np.concatenate([nodes for nodes, _ in parts])
    weights = np.concatenate([w for _, w in parts]) * (1 - u**2 / (batch - 1)) ** ((batch - 4) / 2)
    return u, weights / weights.sum()


def _deviation(batch: int) -> tuple[Floats, Floats]:
    """Nodes and weights for the deviation s of a batch: M s² is chi-squared with M − 1 degrees of freedom."""
    spread = _WIDTH / math.sqrt(2 * batch)
    s, weights = _nodes(max(1e-9, 1 - spread), 1 + spread)
    logs = (batch - 2) * np.log(s) - batch * s**2 / 2
    weights = weights * np.exp(logs - logs.max())
    return s, weights / weights.sum()


def _nodes(low: float, high: float) -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return (high - low) / 2 * nodes + (high + low) / 2, (high - low) / 2 * weights


def sampled(unit: str, batch: int, *, batches: int) -> tuple[float, float]:
    """The first of `differences` by drawing batches, through the module of training: mean and standard error."""
    # One batch per feature.
    norm = torch.nn.LayerNorm(batches)
    torch.nn.init.constant_(norm.weight, GAIN)
    torch.nn.init.constant_(norm.bias, SHIFT)
    h = torch.randn(batch, 1, batches, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = BatchNorm(norm, Places(), population=False)(h), GAIN * h + SHIFT
    if unit == "linear":
        loss = 0.5 * (a - b).square()
    else:
        positive = b.clamp(min=0)
        loss = 0.5 * a.clamp(min=0).square() + 0.5 * positive.square() - positive * a
    means = loss.mean((0, 1)).double()
    return float(means.mean()), float(means.std() / math.sqrt(batches))


def slope(sizes: NDArray[np.int64], values: Floats) -> float:
    """Of log |value| against log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(np.abs(values)), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    sizes, result = np.array(SIZES), {}
    for axes, unit in zip(panels, UNITS, strict=True):
        alone, remaining = differences(unit, sizes)
        result[unit] = {
            "batch": sizes.tolist(),
            "without_decay": alone.tolist(),
            "with_decay": remaining.tolist(),
            "slope_without_decay": slope(sizes, alone),
            "slope_with_decay": slope(sizes, remaining),
        }
        for values, label in ((alone, "population normalisation"), (remaining, "with gamma decay")):
            axes.loglog(sizes, np.abs(values), "o-", label=f"{label}: slope {slope(sizes, values):.2f}", base=2)
        axes.set_title(unit)
        axes.set_xlabel("batch size M")
        axes.legend()
        print(unit, json.dumps({k: v for k, v in result[unit].items() if k.startswith("slope")}))
    panels[0].set_ylabel("|expected loss − that of batch normalisation|")
    figure.savefig(output / "decomposition.png", dpi=110)
    (output / "decomposition.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
