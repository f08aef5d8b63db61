"""Whether a padded vocabulary, joined products of Q, K and V, or another kernel of attention pay on a GPU.

    python docs/experiments/gpu_products.py --output products.json

Milliseconds of single operations in bf16, median of 20 after 5 of warm-up: the head's three products (forward, gradient
of the input, gradient of the weights) with 30,522 and 30,528 rows of weights; three products of D × D and one of
D × 3 D; attention forward and backward with dropout 0.1 by each of PyTorch's kernels. One minute. --small: tiny sizes,
to try it on a CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROUNDS, WARM_UP = 20, 5
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def milliseconds(action: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        wait()
        start = time.perf_counter()
        action()
        wait()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[WARM_UP:])


def head(rows: int, hidden: int, vocabulary: int, device: torch.device) -> dict[str, float]:
    """rows: predictions of a micro-batch."""
    x, weights, gradient = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((rows, hidden), (vocabulary, hidden), (rows, vocabulary))
    )
    return {
        "forward": milliseconds(lambda: x @ weights.T, device),
        "of_input": milliseconds(lambda: gradient @ weights, device),
        "of_weights": milliseconds(lambda: gradient.T @ x, device),
    }


def projections(tokens: int, hidden: int, device: torch.device) -> dict[str, float]:
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    parts = [torch.randn(hidden, hidden, device=device, dtype=torch.bfloat16) for _ in range(3)]
    return {
        "three": milliseconds(lambda: [x @ part.T for part in parts], device),
        "joined": milliseconds(lambda: x @ torch.cat(parts).T, device),
    }


def attention(rows: int, heads: int, length: int, device: torch.device) -> dict[str, float | str]:
    shape = (rows, heads, length, 64)
    found: dict[str, float | str] = {}
    for name, kernel in KERNELS.items():
        q, k, v = (torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        def both(q: Any = q, k: Any = k, v: Any = v) -> None:
            scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum().backward()

        with sdpa_kernel(kernel):
            try:
                found[name] = milliseconds(both, device)
            except RuntimeError as error:
                found[name] = str(error).splitlines()[0][:100]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, rows = (256, 32) if arguments.small else (32_768, 4_864)
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "head": {f"{D} × {V}": head(rows, D, V, device) for D in (768, 1024) for V in (30_522, 30_528)},
        "projections": {str(D): projections(tokens, D, device) for D in (768, 1024)},
        "attention": {str(length): attention(max(1, tokens // length), 16, length, device) for length in (128, 512)},
    }
    text = json.dumps(results, indent=1)
    print(text)
    arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
