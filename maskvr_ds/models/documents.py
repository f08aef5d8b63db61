"""Attention within documents: rows of several documents, in which every token attends to its own document only.

A document ends with a separator token ([SEP]), which text never yields and no mask changes, so the documents of a row
follow from its ids; padding behind the last one is a document of its own, so that no position is without keys. Position
ids restart in every document. The hidden states are those of each document by itself.

transformers' attention interface calls `attend` in the place of its own kernels, which get no mask for padding. On GPUs
in half precision `attend` is torch.nn.attention.varlen (Flash Attention: no dropout, time and memory by document);
elsewhere scaled_dot_product_attention with a mask that is block-diagonal, which computes all pairs of a row.

Shapes: B rows, L positions, N documents at most, H heads, d head size. No host-device synchronisation: N follows from B
and L alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from maskvr_ds.config import ConfigError

# Names of the attention implementation, and of one that computes the same by torch.softmax, whose logits can be seen.
DOCUMENTS, EAGER = "maskvr_documents", "maskvr_documents_eager"
REMEDY = "set data.attention to rows, or choose another architecture"


def use_document_attention(model: PreTrainedModel) -> None:
    """Have the model call `attend`. Raises ConfigError if its attention does not go through the interface."""
    kind = model.config.model_type
    # Some classes would ignore the request, with a warning.
    if not model._can_set_attn_implementation():
        raise ConfigError(
            f"data.attention is documents, and {kind} of transformers computes attention by code of its own, which "
            f"knows no documents; {REMEDY}"
        )
    model.set_attn_implementation(DOCUMENTS)


@contextmanager
def of_rows(model: PreTrainedModel) -> Iterator[None]:
    """Within: the model attends over rows again, by scaled_dot_product_attention."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(DOCUMENTS)


@contextmanager
def without_dropout() -> Iterator[None]:
    """Within: dropout of attention weights raises ConfigError on all devices, as with Flash Attention."""

    def refusing(*tensors: Any, dropout: float = 0.0, **options: Any) -> tuple[torch.Tensor, None]:
        if dropout:
            raise ConfigError(_no_dropout(dropout))
        return attend(*tensors, **options)

    AttentionInterface.register(DOCUMENTS, refusing)
    try:
        yield
    finally:
        AttentionInterface.register(DOCUMENTS, attend)


def starts(input_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """bool [B, L]: whether a document starts at a position, for ids int64 [B, L].

    A second separator at the end of a row, as `full_sequences` packs it, is a document of its own.
    """
    is_separator = input_ids == separator
    first = is_separator.roll(1, 1)
    first[:, :-1] &= ~is_separator[:, :-1]
    first[:, 0] = True
    return first


def positions(first: torch.Tensor) -> torch.Tensor:
    """int64 [B, L]: the position of each token in its document. first: bool [B, L], from `starts`."""
    places = torch.arange(first.shape[1], device=first.device)
    return places - torch.where(first, places, 0).cummax(1).values


def block_mask(first: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L]: whether two positions belong to one document. first: bool [B, L], from `starts`."""
    numbers = first.cumsum(1)
    return (numbers[:, :, None] == numbers[:, None, :])[:, None]


def offsets(first: torch.Tensor) -> torch.Tensor:
    """int32 [N + 1]: where each document starts in the B·L tokens of the batch, then B·L until the end: the documents
    that do not exist are empty. N = B · (L // 2 + 1): no two documents start next to each other but in the last two
    positions of a row. first: bool [B, L], from `starts`."""
    rows, length = first.shape
    most, total = rows * (length // 2 + 1), rows * length
    places = torch.arange(total, device=first.device, dtype=torch.int32)
    found = torch.full((most + 1,), total, device=first.device, dtype=torch.int32)
    return found.scatter_reduce_(0, first.flatten().cumsum(0) - 1, places, "amin")


def first_position(encoder: nn.Module) -> int:
    """Position id of the first token of a row: 0, or behind the row for padding that tables of RoBERTa-likes have."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def document_inputs(input_ids: torch.Tensor, separator: int, first_id: int, *, varlen: bool) -> dict[str, torch.Tensor]:
    """Arguments of the model for rows of documents, int64 [B, L]: position ids, and what `attend` reads.

    separator: id of the token that ends a document. first_id: from `first_position`. varlen: for Flash Attention.
    """
    first = starts(input_ids, separator)
    found = {"position_ids": positions(first) + first_id}
    if varlen:
        return {**found, "document_offsets": offsets(first)}
    return {**found, "document_mask": block_mask(first)}


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether documents are computed by torch.nn.attention.varlen: Flash Attention, in half precision on GPUs."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_mask: torch.Tensor | None = None,
    document_offsets: torch.Tensor | None = None,
    document_positions: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer, called by transformers: query [B, H, L, d], key and value [B, H' ≤ H, L, d] → [B, L, H, d].

    sliding_window: w, the layer attends to |i − j| < w; None: to all. document_mask: from `block_mask`.
    document_offsets: from `offsets`. document_positions: int64 [B, L], the numbers i of the positions in their row;
    None: from 0. Raises ConfigError for dropout with `document_offsets`.
    """
    if document_offsets is not None:
        if dropout:
            raise ConfigError(_no_dropout(dropout))
        return _by_offsets(query, key, value, document_offsets, scaling, sliding_window), None
    assert document_mask is not None, "checked at the start: the architecture passes arguments on to its attention"
    mask = _in_window(document_mask, sliding_window, document_positions)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, **others
    )
    return found


def attend_eagerly(
    _: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_mask: torch.Tensor | None = None,
    document_offsets: torch.Tensor | None = None,
    document_positions: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, without dropout, by a softmax over float32 [B, H, L, L], -inf outside of the documents. Returns the
    weights too."""
    if document_offsets is not None:
        document_mask = _mask_of_offsets(document_offsets, query.shape[0], query.shape[2])
    assert document_mask is not None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = (query @ key.transpose(2, 3)).float() * (query.shape[3] ** -0.5 if scaling is None else scaling)
    mask = _in_window(document_mask, sliding_window, document_positions)
    weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), weights


def _in_window(
    document_mask: torch.Tensor, sliding_window: int | None, places: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [B, 1, L, L]: `document_mask`, restricted to |i − j| < sliding_window if given. places: i, int64 [B, L];
    None: from 0."""
    if sliding_window is None:
        return document_mask
    if places is None:
        places = torch.arange(document_mask.shape[3], device=document_mask.device)[None]
    return document_mask & ((places[:, :, None] - places[:, None]).abs() < sliding_window)[:, None]


def _mask_of_offsets(document_offsets: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """The `block_mask` of the rows, from their `offsets`."""
    places = torch.arange(rows * length, device=document_offsets.device, dtype=document_offsets.dtype)
    numbers = torch.bucketize(places, document_offsets, right=True).view(rows, length)
    return (numbers[:, :, None] == numbers[:, None, :])[:, None]


def _no_dropout(dropout: float) -> str:
    """What is wrong with dropout of attention."""
    return (
        f"data.attention is documents, which torch.nn.attention.varlen computes on GPUs in half precision, without "
        f"dropout of attention weights, and that of the model is {dropout:g}; set it to 0 "
        "(model.attention_probs_dropout_prob, in other architectures that of model.settings)"
    )


def _by_offsets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_offsets: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """[B, L, H, d]; the B·L tokens are one sequence of documents."""
    rows, heads, length, size = query.shape
    reach = -1 if sliding_window is None else sliding_window - 1
    if (groups := heads // key.shape[1]) > 1:  # grouped queries, which varlen_attn of torch 2.11 does not know
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    found = varlen_attn(
        queries,
        keys,
        values,
        document_offsets,
        document_offsets,
        length,
        length,
        scale=scaling,
        window_size=(reach, reach),
    )
    assert isinstance(found, torch.Tensor)
    return found.view(rows, length, heads, size)


AttentionInterface.register(DOCUMENTS, attend)
AttentionInterface.register(EAGER, attend_eagerly)
# No mask of transformers: that of padding is part of `document_mask`.
for _name in (DOCUMENTS, EAGER):
    AttentionMaskInterface.register(_name, lambda *_, **__: None)
