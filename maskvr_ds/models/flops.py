"""Model FLOPs: matrix products of the model as transformers runs it, counted by torch."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from maskvr_ds.models.encoder import MaskedLanguageModel


def flops_per_sequence(config: PreTrainedConfig, sequence_length: int, predictions: int, *, batch: int) -> float:
    """Floating-point operations per sequence, forward and backward (backward = 2 × forward).

    Matrix products only, counting a multiply-add as two, without recomputation (Narayanan et al. 2021, arXiv
    2104.04473, appendix). Counted in a forward pass of the model itself, so that gated feed-forward layers, layers that
    share weights and embeddings narrower than D need no formula. Layers with sliding windows count the pairs of
    positions inside of their window only, whatever the kernel computes. For BERT, with L positions, K predictions,
    hidden size D, intermediate size I: per layer 8LD² + 4L²D + 4LDI, in the head 2KD² + 2KDV.

    batch: sequences per forward pass, which share what depends on no sequence (DeBERTa's relative positions).
    """
    L, K = sequence_length, predictions
    one, two = _count(config, L, K)
    each, shared = two - one, 2 * one - two
    return 3.0 * (each + shared / batch - _outside_of_windows(config, L))


def pairs_in_window(length: int, reach: int) -> int:
    """Number of ordered pairs (i, j) of `length` positions with |i − j| ≤ reach."""
    reach = min(reach, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)


def _outside_of_windows(config: PreTrainedConfig, length: int) -> float:
    """FLOPs of attention, forward, for pairs outside of the windows of `layer_types` (QKᵀ and the weighted sum)."""
    layers = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    reach = getattr(config, "sliding_window", None)
    if not layers or reach is None:
        return 0.0
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return layers * 4.0 * width * (length**2 - pairs_in_window(length, reach))


@torch.no_grad()
def _count(config: PreTrainedConfig, length: int, predictions: int) -> tuple[int, int]:
    """FLOPs of a forward pass over one sequence, and over two. The counter knows no fused attention on CPUs."""
    eager = copy.deepcopy(config)
    eager._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        try:
            return _forward(eager, length, predictions, torch.device("meta"))
        # Models that read values in their forward pass (DeBERTa-v2) cannot run without data.
        except RuntimeError:
            return _forward(eager, length, predictions, torch.device("cpu"))


def _forward(config: PreTrainedConfig, length: int, predictions: int, device: torch.device) -> tuple[int, int]:
    with device:
        model = MaskedLanguageModel(config).eval()
        # Any token but [PAD], whose positions some models do not count.
        ids = torch.full((2, length), 0 if config.pad_token_id else 1)
        positions = torch.zeros((2, predictions), dtype=torch.long)
    found = []
    for rows in (1, 2):
        with FlopCounterMode(display=False) as counter:
            model(ids[:rows], positions[:rows])
        found.append(counter.get_total_flops())
    return found[0], found[1]
