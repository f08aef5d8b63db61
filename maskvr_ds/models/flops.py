"""Model FLOPs."""

from transformers import BertConfig


def flops_per_sequence(config: BertConfig, sequence_length: int, predictions: int) -> float:
    """Floating-point operations per sequence, forward and backward (backward = 2 × forward).

    Matrix products only, counting a multiply-add as two: per layer QKVO 8LD², attention 4L²D, feed-forward 4LDI; in the
    head 2KD² + 2KDV (Narayanan et al. 2021, arXiv 2104.04473, appendix, without recomputation).
    """
    L, K, D, V = sequence_length, predictions, config.hidden_size, config.vocab_size
    layer = 8 * L * D * D + 4 * L * L * D + 4 * L * D * config.intermediate_size
    return 3.0 * (config.num_hidden_layers * layer + 2 * K * D * D + 2 * K * D * V)
