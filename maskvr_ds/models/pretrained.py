"""Initialising from a pretrained model: a Hugging Face folder, as written by save_pretrained and `maskvr export`.

transformers reads the folder (older names of tensors, prefixes, shards); what it would only warn about is an error
here. Only rank 0 reads, and broadcasts the weights, so all ranks start with the same bits and the folder may be on a
single host. Only safetensors files are read (nothing is unpickled), and no code of the folder is run. Names on a hub
are folders by now (config/hub_names.py). Once a run has a checkpoint it no longer needs the folder: the checkpoint
holds sizes, weights and the SHA-256 of the initial weights.

Collectives: `load`, one fp32 broadcast per parameter after `distributed.run_on_rank0`.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from maskvr_ds.config import ConfigError
from maskvr_ds.config.architectures import CONFIG_FILE
from maskvr_ds.models.encoder import build, names_of_parameters
from maskvr_ds.models.initial_folder import InitialWeights, few, table_rows, weights_digest, weights_files
from maskvr_ds.models.new_vocabulary import RowSources
from maskvr_ds.runtime import distributed

logger = logging.getLogger(__name__)

# Parts of names of tensors: pooler, next-sentence and sentence-order heads.
_OF_PAIRS = ("pooler.", "seq_relationship.", "sop_classifier.")
_RTD = ("mask_predictions.", "discriminator_predictions.")
# Of tensors that masked-LM training ignores: those, a buffer of old versions, heads of replaced-token detection.
_UNUSED = (*_OF_PAIRS, "position_ids", *_RTD)
_FLOAT_NAMES = ("F64", "F32", "BF16", "F16")


def load(module: PreTrainedModel, initial: InitialWeights) -> None:
    """Load the folder's weights into an fp32 model on the CPU and log what was loaded, and whether the head is new.

    Collective: call on all ranks, before DeepSpeed casts or partitions the module. Raises ConfigError (RemoteError on
    the other ranks) if tensors are missing, unexpected, non-finite or of another shape or type, or if the files have
    changed since the run started.
    """
    lines = distributed.run_on_rank0(lambda: _read(module, initial))
    for parameter in module.parameters():
        parameter.data.copy_(distributed.broadcast(parameter.data.to(distributed.device())))
    for line in lines:
        logger.info("%s", line)


@torch.no_grad()
def _read(module: PreTrainedModel, initial: InitialWeights) -> list[str]:
    """Copy the weights into the module; returns lines for the log."""
    folder, files = initial.folder, weights_files(initial.folder)
    if (found := weights_digest(folder)) != initial.sha256:
        raise ConfigError(
            f"{files[0]}: changed since the run started (SHA-256 {initial.sha256[:12]}, now {found[:12]}); restore it"
        )
    stored = _check_files(files, module.all_tied_weights_keys)
    loaded, info = _load(module, initial)
    # Tied parameters appear once.
    parameters, names = dict(module.named_parameters()), names_of_parameters(module)
    prefix = f"{module.base_model_prefix}."
    pairs = {name for name in parameters if any(part in name for part in _OF_PAIRS)}
    head = {name for name, p in parameters.items() if not any(n.startswith(prefix) for n in names[p])} - pairs
    missing = {name for name, p in parameters.items() if all(n in info["missing_keys"] for n in names[p])}
    unexpected = sorted(info["unexpected_keys"])
    new_head = bool(initial.new_head or (initial.new_head is None and head and head <= missing))
    new_pairs = set() if initial.new_head is False else _absent_layers(pairs, missing)
    missing -= new_pairs
    _check_shapes(folder, info["mismatched_keys"], head if new_head else set())
    _check_names(module, folder, missing - (head if new_head else set()), unexpected, other_head=new_head)
    new = new_pairs | (head if new_head else set())
    of_tokens = _rows_of_tokens(module) if initial.rows is not None else set()
    for name, tensor in loaded.named_parameters():
        if name in parameters and name not in new:
            if not tensor.isfinite().all():
                raise ConfigError(f"{folder}: {name} has non-finite values; the model is damaged")
            if initial.rows is not None and name in of_tokens:
                _fill(parameters[name], tensor, initial.rows)
            else:
                parameters[name].copy_(tensor)
    lines = _summary(initial, files, parameters, new, head <= missing, unexpected)
    if initial.rows is not None:
        lines.append(str(initial.rows))
    if new_pairs:
        lines.append(f"of the head for sentence pairs the folder lacks {few(sorted(new_pairs))}: random weights")
    # Of the stored names: some classes of transformers are silent about tensors that they do not use.
    if any(name.startswith(_RTD) for name in stored):
        lines.append(
            f"the model in {folder} was trained by replaced-token detection, which uses no prediction head: expect a "
            "masked accuracy near 0 at first, also if the folder has tensors of that name"
        )
    return lines


def _absent_layers(names: set[str], missing: set[str]) -> set[str]:
    """The missing names whose layers are missing completely: a weight without its bias is damage."""
    damaged = {name.rpartition(".")[0] for name in names - missing}
    return {name for name in names & missing if name.rpartition(".")[0] not in damaged}


def _rows_of_tokens(module: PreTrainedModel) -> set[str]:
    """Names of the parameters with one row per token: those whose size changes with the vocabulary's."""
    sizes = []
    for rows in (module.config.vocab_size, module.config.vocab_size + 1):
        config = copy.deepcopy(module.config)
        config.vocab_size = rows
        with torch.device("meta"):
            sizes.append({name: parameter.shape for name, parameter in build(config).named_parameters()})
    found = {name for name, shape in sizes[0].items() if shape != sizes[1][name]}
    assert all(sizes[0][name][1:] == sizes[1][name][1:] for name in found), "a table with its tokens in columns"
    return found


def _fill(new: torch.Tensor, old: torch.Tensor, sources: RowSources) -> None:
    """Set rows of `new` [V, …] to means of rows of `old`; those without a source stay as they are."""
    bounds, rows = torch.from_numpy(sources.bounds), torch.from_numpy(sources.old)
    counts = bounds.diff()
    single, several = counts == 1, torch.nonzero(counts > 1).flatten().tolist()
    new[single] = old[rows[bounds[:-1][single]]]
    for index in several:
        new[index] = old[rows[bounds[index] : bounds[index + 1]]].mean(0)


def _load(module: PreTrainedModel, initial: InitialWeights) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A second model with the folder's weights and its own vocabulary, and what transformers found: missing,
    unexpected, mismatched keys."""
    folder, config = initial.folder, copy.deepcopy(module.config)
    if initial.rows is not None:
        config.vocab_size = table_rows(folder)
        # The folder's table may not have the row; which one it is matters in training only.
        config.pad_token_id = 0
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # everything it would warn about is checked here
    transformers_logging.disable_progress_bar()
    try:
        return type(module).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # SafetensorError, and whatever a conversion of old names raises.
    except Exception as error:
        raise ConfigError(f"{folder}: transformers cannot load its weights: {' '.join(str(error).split())}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_files(files: list[Path], tied: dict[str, str]) -> set[str]:
    """The names of the stored tensors. Raises ConfigError for types of tensors that are no weights, and for copies of a
    tied tensor that differ.

    tied: name of a copy -> name of the tensor.
    """
    stored: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118
                    stored[name] = file
                    if content.get_slice(name).get_dtype() in _FLOAT_NAMES or name.endswith("position_ids"):
                        continue
                    raise ConfigError(
                        f"{file}: {name} is {content.get_tensor(name).dtype}; quantised weights cannot be trained: "
                        "save the model in float32, bfloat16 or float16"
                    )
        except SafetensorError as error:
            raise ConfigError(f"{file}: not a complete safetensors file: {error}") from None
    for copied, name in tied.items():
        if copied in stored and name in stored:
            values = []
            for one in (copied, name):
                with safe_open(stored[one], framework="pt") as content:
                    values.append(content.get_tensor(one))
            if not torch.equal(*values):
                raise ConfigError(
                    f"{stored[copied]}: {copied} and {name} differ, but are one tensor in the model trained here "
                    "(tie_word_embeddings); models with an untied head are not supported"
                )
    return set(stored)


def _check_shapes(folder: Path, mismatched: Any, new: set[str]) -> None:
    for name, found, expected in sorted(mismatched):
        if name not in new:
            raise ConfigError(
                f"{folder}: {name} has shape {list(found)}, expected {list(expected)} by {CONFIG_FILE} and "
                "model.settings; the files are from different models"
            )


def _check_names(
    module: PreTrainedModel, folder: Path, missing: set[str], unexpected: list[str], *, other_head: bool
) -> None:
    """other_head: the folder's model may have any head, or none; its tensors are not used."""
    prefix = f"{module.base_model_prefix}."
    unknown = [name for name in unexpected if not any(part in name for part in _UNUSED)]
    if other_head:
        unknown = [name for name in unknown if name.startswith(prefix)]
    faults = [
        f"{len(names)} {what} ({few(sorted(names))})"
        for what, names in (("missing", missing), ("unexpected", unknown))
        if names
    ]
    if faults:
        of_head = missing and not any(name.startswith(prefix) for name in missing)
        remedy = "set model.new_head=true to start with a new prediction head" if of_head else "use a complete folder"
        raise ConfigError(
            f"{folder}: tensors do not match a {type(module).__name__} with this {CONFIG_FILE}: {'; '.join(faults)}; "
            f"{remedy}"
        )


def _summary(
    initial: InitialWeights,
    files: list[Path],
    parameters: dict[str, torch.nn.Parameter],
    new: set[str],
    headless: bool,
    unexpected: list[str],
) -> list[str]:
    count = sum(parameter.numel() for name, parameter in parameters.items() if name not in new)
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files of {initial.folder}"
    lines = [
        f"weights of {where}: {len(parameters) - len(new)} tensors, {count:,} parameters, SHA-256 "
        f"{initial.sha256[:12]}" + (f"; unused: {few(unexpected)}" if unexpected else "")
    ]
    if new := {name for name in new if not any(part in name for part in _OF_PAIRS)}:
        size = sum(parameters[name].numel() for name in new)
        why = "the folder has none" if headless else "model.new_head is true"
        lines.append(f"the prediction head starts with random weights ({len(new)} tensors, {size:,} parameters): {why}")
    return lines
