"""What an architecture cannot do, asked of the model itself before a run spends anything.

One forward pass of a full row and one backward pass, in eval mode, on the CPU, of weights that are not changed. Nothing
is looked up by the name of an architecture: RoBERTa-likes lose `pad_token_id + 1` of their positions, others have
parameters that masked-LM training never reaches, or no kernels in bf16; versions of transformers differ.

L: positions of a row. No collectives.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from maskvr_ds.config import ConfigError
from maskvr_ds.models import documents
from maskvr_ds.models.encoder import MaskedLanguageModel

# Positions of the row of the backward pass: enough for what a longer row reaches, at bounded cost. Longer
# rows go through a single layer.
_BACKWARD = 512
_CPU = torch.device("cpu")
# Relative difference of hidden states that rounding may explain.
_AGREEMENT = 1e-3
# Positions by which the longest row may fall short of max_position_embeddings and is still looked for.
_SHORTER = 8


def check_model(module: MaskedLanguageModel, length: int, dtype: torch.dtype, device: torch.device = _CPU) -> list[str]:
    """Run the fp32 module on rows of `length` tokens; returns the names of parameters that get no gradient.

    dtype, device: in which and where the engine will compute. Raises ConfigError naming value, rule and remedy if a row
    is too long, the architecture takes another token for padding, does not run in bf16, does not attend within
    documents as asked, or computes the layers below late mask tokens otherwise than with [MASK] hidden from attention.
    """
    config = module.mlm.config
    training = module.training
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            with module.without_late_masks():
                _check_padding(module)
                check_length(module, length)
                if module.separator is not None:
                    _check_documents(module, min(length, _BACKWARD))
                    if documents.has_varlen(device, dtype):
                        _check_no_dropout(module)
            if module.late is not None:
                check_late_masks(module, min(length, _BACKWARD))
            if dtype == torch.bfloat16:
                _check_bf16(module, min(length, _BACKWARD))
            return _without_gradient(module, min(length, _BACKWARD))
    finally:
        module.train(training)
        for parameter in module.parameters():
            parameter.grad = None
        assert module.mlm.config is config


def _row(module: MaskedLanguageModel, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row without padding, int64 [1, L], and the position of one prediction, int64 [1, 1]."""
    token = next(token for token in range(3) if token not in (module.mlm.config.pad_token_id, module.separator))
    return torch.full((1, length), token), torch.full((1, 1), length - 1)


def _text(module: MaskedLanguageModel, length: int, mask_id: int | None = None) -> torch.Tensor:
    """A row of different tokens, int64 [L], none of them special. Of equal ones an average does not depend on which are
    seen: with rotary positions, attention across any border would go unnoticed."""
    special = [token for token in (module.mlm.config.pad_token_id, module.separator, mask_id) if token is not None]
    row = torch.arange(length) * 7919 % module.mlm.config.vocab_size
    ordinary = next(token for token in range(4) if token not in special)
    return torch.where(torch.isin(row, torch.tensor(special)), ordinary, row)


def _check_padding(module: MaskedLanguageModel) -> None:
    """The embedding of padding gets no gradient, and some architectures count positions from other tokens only."""
    pad = module.mlm.config.pad_token_id
    table = module.mlm.get_input_embeddings()
    if (theirs := getattr(table, "padding_idx", None)) not in (None, pad):
        raise ConfigError(
            f"model: {module.mlm.config.model_type} of transformers always takes token {theirs} for padding, and the "
            f"corpus pads with {pad}: token {theirs} would not be trained. Build the corpus with a tokenizer whose "
            f"padding token has the id {theirs}"
        )


def check_length(module: MaskedLanguageModel, length: int) -> None:
    """Raise ConfigError if a row of `length` tokens is too long for the module."""
    config = module.mlm.config
    # Rotary and relative positions have no table that ends.
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ConfigError(
            f"model: rows of {length} tokens exceed max_position_embeddings {most} of {config.model_type}; build the "
            f"corpus with --sequence-length {most} or less, or set it higher"
        )
    # What limits a row does not depend on the depth, and long rows take minutes on a CPU.
    module = module if length <= _BACKWARD else _shallow(module)
    if (error := _error(module, length)) is None:
        return
    longest = next((n for n in range(length - 1, max(0, length - _SHORTER), -1) if _error(module, n) is None), None)
    text = " ".join(str(error).split())
    if longest is None:
        raise ConfigError(f"model: {config.model_type} cannot process a row of {length} tokens: {text}")
    raise ConfigError(
        f"model: rows of {length} tokens are too long for {config.model_type} with max_position_embeddings {most}, "
        f"which takes at most {longest} (it counts positions from pad_token_id + 1); build the corpus with "
        f"--sequence-length {longest} or less"
        + ("" if most is None else f", or set max_position_embeddings to {most + length - longest}")
    )


def _shallow(module: MaskedLanguageModel) -> MaskedLanguageModel:
    """The architecture with one layer and random weights; the module itself if it cannot be made so."""
    config = copy.deepcopy(module.mlm.config)
    try:
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        return MaskedLanguageModel(config, separator=module.separator).train(module.training)
    except (ConfigError, AttributeError, ValueError):
        return module


@torch.no_grad()
def _check_documents(module: MaskedLanguageModel, length: int) -> None:
    """Raise ConfigError unless hidden states of documents in a row are those of each document by itself, computed by
    transformers' own attention."""
    separator, kind = module.separator, module.mlm.config.model_type
    assert separator is not None
    row = _text(module, length)
    row[length // 3] = row[-1] = separator
    parts = row.tensor_split([length // 3 + 1])
    try:
        found = module.hidden(row[None], torch.arange(length)[None])[0]
    # Whatever an architecture raises for arguments that it does not know.
    except Exception as error:
        raise ConfigError(
            f"data.attention is documents, and {kind} of transformers cannot be given the documents "
            f"({' '.join(str(error).split())}); {documents.REMEDY}"
        ) from error
    with documents.of_rows(module.mlm):
        expected = torch.cat([module.mlm.base_model(input_ids=part[None])[0][0] for part in parts])
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    # "not <=" also refuses NaN.
    if not difference <= _AGREEMENT * largest:
        raise ConfigError(
            f"data.attention is documents, and {kind} of transformers computes other hidden states for documents in a "
            f"row than for each by itself (difference {difference:.2g}, largest {largest:.2g}): its attention or its "
            f"positions cross their borders; {documents.REMEDY}"
        )


@torch.no_grad()
def check_late_masks(module: MaskedLanguageModel, length: int) -> None:
    """Raise ConfigError unless the hidden states that enter layer N are those of transformers' own attention that does
    not see [MASK] in the layers below, with the embeddings of [MASK] in their places."""
    late, kind = module.late, module.mlm.config.model_type
    assert late is not None
    row = _text(module, length, late.mask_id)[None]
    chosen = torch.arange(length) % 3 == 1
    parts = [slice(0, length)]
    if module.separator is not None:
        row[0, half := length // 3 * 2] = module.separator
        chosen[half] = False
        parts = [slice(0, half + 1), slice(half + 1, length)]
    row[:, chosen] = late.mask_id
    positions = chosen.nonzero().T
    module.late = replace(late, hidden=int(chosen.sum()))
    try:
        for module.trims_late in (True, False):
            with _entering(module, late.layer) as states:
                module.hidden(row, positions)
            found = states[late.layer][0]
            expected = torch.cat([_without_masks(module, row[:, part], chosen[part], late.layer) for part in parts])
            difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
            if not difference <= _AGREEMENT * largest:
                raise ValueError(f"difference {difference:.2g}, largest {largest:.2g}")
    # Whatever an architecture raises for shorter rows, attention masks that it does not take, or no layer called.
    except Exception as error:
        raise ConfigError(
            f"{late.setting} {late.layer}: {kind} of transformers does not compute the layers below for the "
            f"positions that are not [MASK] alone ({' '.join(str(error).split())}); {late.remedy}"
        ) from error
    finally:
        module.late, module.trims_late = late, None


def _without_masks(module: MaskedLanguageModel, row: torch.Tensor, masked: torch.Tensor, layer: int) -> torch.Tensor:
    """What enters a layer, [L, D], if the layers below do not attend to masked positions; there, their embeddings."""
    rows = nullcontext() if module.separator is None else documents.of_rows(module.mlm)
    with module.without_late_masks(), rows, _entering(module, layer) as states:
        module.mlm.base_model(input_ids=row, attention_mask=~masked[None])
    return torch.where(masked[:, None], states[0][0], states[layer][0])


@contextmanager
def _entering(module: MaskedLanguageModel, layer: int) -> Iterator[dict[int, torch.Tensor]]:
    """Within: the hidden states with which the first layer and `layer` are called, by number."""
    found: dict[int, torch.Tensor] = {}

    def reading(number: int) -> Callable[..., None]:
        def read(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[number] = args[0] if args else kwargs["hidden_states"]

        return read

    layers = list(module.layers)
    hooks = [layers[n].register_forward_pre_hook(reading(n), with_kwargs=True) for n in (0, layer)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _check_no_dropout(module: MaskedLanguageModel) -> None:
    """Raise ConfigError if the model has dropout of attention weights in training."""
    ids, positions = _row(module, 2)
    module.train()
    with documents.without_dropout():
        module(ids, positions)
    module.eval()


@torch.no_grad()
def _error(module: MaskedLanguageModel, length: int) -> Exception | None:
    """What a forward pass of a row raises; None if it runs."""
    try:
        module(*_row(module, length))
    except (IndexError, RuntimeError, ValueError, AssertionError) as error:
        return error
    return None


def _check_bf16(module: MaskedLanguageModel, length: int) -> None:
    rounded = copy.deepcopy(module)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    if (error := _error(rounded, length)) is not None:
        raise ConfigError(
            f"model: {module.mlm.config.model_type} of transformers does not run in bf16 "
            f"({' '.join(str(error).split())}); choose an fp32 file as deepspeed"
        )


def _without_gradient(module: MaskedLanguageModel, length: int) -> list[str]:
    ids, positions = _row(module, length)
    with torch.enable_grad():
        if module.has_pair_head:
            losses, pair_logits = module(ids, positions, labels=ids[:, :1], segment_starts=torch.tensor([length // 2]))
            (losses.sum() + pair_logits.sum()).backward()
        else:
            module(ids, positions, labels=ids[:, :1]).sum().backward()
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def check_buffers(module: torch.nn.Module) -> None:
    """Assert that frequencies of rotary embeddings are fp32: rounded to bf16, positions of long rows are wrong by
    several per cent of the logits. DeepSpeed >= 0.19.8 casts parameters only."""
    for name, buffer in module.named_buffers():
        assert "inv_freq" not in name or buffer.dtype == torch.float32, f"{name} is {buffer.dtype}, expected float32"
