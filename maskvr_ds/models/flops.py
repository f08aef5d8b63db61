"""Model FLOPs: matrix products of the model as transformers runs it, counted by torch."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.late_masks import LateMasks


def flops_per_sequence(
    config: PreTrainedConfig,
    sequence_length: int,
    predictions: int,
    *,
    batch: int,
    documents: tuple[NDArray[np.int64], int] | None = None,
    late: LateMasks | None = None,
) -> float:
    """Floating-point operations per sequence, forward and backward (backward = 2 × forward).

    Matrix products only, counting a multiply-add as two, without recomputation (Narayanan et al. 2021, arXiv
    2104.04473, appendix). Counted in a forward pass of the model itself, so that gated feed-forward layers, layers that
    share weights and embeddings narrower than D need no formula. Layers with sliding windows count the pairs of
    positions inside of their window only, whatever the kernel computes. For BERT, with L positions, K predictions,
    hidden size D, intermediate size I: per layer 8LD² + 4L²D + 4LDI, in the head 2KD² + 2KDV.

    batch: sequences per forward pass, which share what depends on no sequence (DeBERTa's relative positions).
    documents: lengths of the documents of some rows, int64 [·], and the number of these rows, if attention is within
    documents: then only pairs within a document are counted, the mean over the rows.
    late: late mask tokens: the layers below them count the positions of a training step that they get, and of pairs
    outside of documents or windows as many as on average.
    """
    L, K = sequence_length, predictions
    one, two = _count(config, L, K, late)
    each, shared = two - one, 2 * one - two
    lengths, rows = (np.array([L]), 1) if documents is None else documents
    return 3.0 * (each + shared / batch - _not_attended(config, L, lengths, rows, late))


def pairs_in_documents(lengths: NDArray[np.int64], reach: int | None = None) -> int:
    """Number of ordered pairs (i, j) of positions of the same document, with |i − j| ≤ reach if given, in documents of
    `lengths` positions, int64 [·]: Σ n², or Σ n (2r + 1) − r (r + 1) with r = min(reach, n − 1)."""
    reaches = lengths - 1 if reach is None else np.minimum(reach, lengths - 1)
    return int((lengths * (2 * reaches + 1) - reaches * (reaches + 1)).sum())


def _not_attended(
    config: PreTrainedConfig, length: int, lengths: NDArray[np.int64], rows: int, late: LateMasks | None
) -> float:
    """FLOPs of attention (QKᵀ and the weighted sum), forward, that a count of all pairs of a row has too many: of pairs
    outside of the documents, and outside of the windows of `layer_types`."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    reach = getattr(config, "sliding_window", None)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    below, share = (0, 1.0) if late is None else (late.layer, (1 - late.hidden / length) ** 2)
    missing = 0.0
    for number, kind in enumerate(kinds):
        attended = pairs_in_documents(lengths, reach if kind == "sliding_attention" else None) / rows
        missing += (length**2 - attended) * (share if number < below else 1.0)
    return 4.0 * width * missing


@torch.no_grad()
def _count(config: PreTrainedConfig, length: int, predictions: int, late: LateMasks | None) -> tuple[int, int]:
    """FLOPs of a forward pass over one sequence, and over two. The counter knows no fused attention on CPUs."""
    eager = copy.deepcopy(config)
    eager._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        try:
            return _forward(eager, length, predictions, late, torch.device("meta"))
        # Models that read values in their forward pass (DeBERTa-v2) cannot run without data.
        except RuntimeError:
            return _forward(eager, length, predictions, late, torch.device("cpu"))


def _forward(
    config: PreTrainedConfig, length: int, predictions: int, late: LateMasks | None, device: torch.device
) -> tuple[int, int]:
    with device:
        model = MaskedLanguageModel(config, late=late).eval()
        model.trims_late = True
        # Any token but [PAD], whose positions some models do not count.
        ids = torch.full((2, length), 0 if config.pad_token_id else 1)
        positions = torch.zeros((2, predictions), dtype=torch.long)
    found = []
    for rows in (1, 2):
        with FlopCounterMode(display=False) as counter:
            model(ids[:rows], positions[:rows])
        found.append(counter.get_total_flops())
    return found[0], found[1]
