"""Masks of this package in transformers' Trainer: dataset wrapper, data collator, loss, callback.

    rows = EpochDataset(CorpusDataset("corpus"))
    collator = MaskingCollator.for_corpus("corpus", seed=0, strategy="fully_explored")
    Trainer(model, arguments, train_dataset=rows, data_collator=collator,
            compute_loss_func=masked_lm_loss, callbacks=[EpochCallback()])

B sequences, L positions, K predictions per sequence, V vocabulary. A mask is a function of (seed, epoch, sample id), as
in `maskvr train` with the same seed: the dataset adds sample id and epoch to each row, wherever and in whichever order
rows are read, so that workers, ranks, accumulation and a resumed Trainer do not matter.

The epoch is a number in shared memory, which EpochCallback sets before the rows of an epoch are read. `set_epoch` alone
is not enough: accelerate calls it on a sampler that has one instead of on the dataset (several ranks, and a resumed
epoch), and on the dataset with 0 when it is evaluated; workers that persist have a copy of the dataset. Until it is
set, reading a row is an error.

Strategies that need gradients of the run (mapnet, auto) and `same_batch` of fully_explored, which needs a row several
times in a batch, are for `maskvr train` only.
"""

import json
import operator
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.keys import MASKS
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.masking.parameters import corpus_parameters, strategy_parameters, token_scores
from maskvr_ds.masking.strategies import Parameters

# Label of a position without prediction, for transformers and torch.
IGNORED = -100
# Sample id of a row that only fills a batch.
FILLER = -1
_ID_BITS = (1 << 32) - 1


class Row(NamedTuple):
    """A row with what its mask depends on. Not a mapping: Trainer removes keys that the model does not know from those.

    input_ids: token ids with special tokens; None in a row that only fills a batch. token_type_ids: of the same length,
    for pairs; None: the model's default, 0 everywhere.
    """

    input_ids: Sequence[int] | None
    sample_id: int
    epoch: int
    token_type_ids: Sequence[int] | None = None


class CorpusDataset(Dataset):
    """The rows of a corpus as {"input_ids": int64 [L]}; opened again in each process that reads it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._corpus: Corpus | None = Corpus(self.folder)
        self._rows = self._corpus.rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < self._rows:
            raise IndexError(index)
        self._corpus = self._corpus or Corpus(self.folder)
        ids = np.empty((1, self._corpus.sequence_length), self._corpus.dtype)
        self._corpus.take(np.array([index]), out=ids)
        return {"input_ids": ids[0].astype(np.int64)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_corpus": None}


class EpochDataset(Dataset):
    """A dataset whose rows carry their number and the epoch.

    Args:
        dataset: with `__len__` and `__getitem__` (not iterable); its items have "input_ids" and, for pairs,
            "token_type_ids"; other columns are not read. The index is the sample id: the order of the dataset must be
            the same in every run that is to have the same masks.
        epoch: fixed, from 0, for a dataset to evaluate on; None: set by EpochCallback.
        multiple_of: sequences in a batch over all ranks, per_device_train_batch_size × ranks. The dataset is filled up
            with rows without tokens and predictions, so that accelerate does not fill the last batch with rows that
            were read before, whose predictions would then count twice.

    Raises TypeError for a stream, or items without input_ids, ValueError if an argument is out of range, IndexError for
    an index outside [0, len), RuntimeError if a row is read before its epoch is known.
    """

    def __init__(self, dataset: Any, *, epoch: int | None = None, multiple_of: int = 1) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{type(dataset).__name__}: a dataset with __len__ and __getitem__ expected: the masks of a row depend "
                "on its number. Store a stream first, or have it yield Row(input_ids, number, epoch) and drop "
                "EpochDataset and EpochCallback"
            )
        if epoch is not None and operator.index(epoch) < 0:
            raise ValueError(f"epoch is {epoch}; a number from 0 expected, or None for that of EpochCallback")
        if multiple_of < 1:
            raise ValueError(
                f"multiple_of is {multiple_of}; the number of sequences in a batch over all ranks expected"
            )
        self.dataset = dataset
        self.multiple_of = multiple_of
        # In shared memory: workers that persist across epochs see changes.
        self._epoch = torch.tensor([-1 if epoch is None else epoch]).share_memory_()
        self._fixed = epoch is not None
        self._followed = False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the rows that are read from now on; ignored if it is fixed, or after `follow`.

        accelerate calls this with the number of times that a process has read the dataset before. Raises ValueError for
        an earlier epoch than before, which accelerate's are in a resumed training.
        """
        if self._fixed or self._followed:
            return
        if epoch < (before := int(self._epoch)):
            raise ValueError(
                f"epoch {epoch} after {before}: accelerate counts epochs from 0 in every process; set them by "
                "follow(epoch), which it does not overrule"
            )
        self._epoch[0] = epoch

    def follow(self, epoch: int) -> None:
        """Set the epoch of the rows that are read from now on, and ignore `set_epoch` from now on: for callbacks and
        loops of your own, before each epoch. Ignored if the epoch is fixed."""
        self._followed = True
        if not self._fixed:
            self._epoch[0] = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple_of) * self.multiple_of

    def __getitem__(self, index: int) -> Row:
        epoch = int(self._epoch)
        if epoch < 0:
            raise RuntimeError(
                "the epoch is not known: add EpochCallback() to Trainer's callbacks, or call follow(epoch). Trainer's "
                "train_sampling_strategy group_by_length and batch_rebalance read rows before any epoch: not supported"
            )
        index = operator.index(index)
        # Negative ones would be other sample ids, with other masks.
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: must be from 0 to {len(self) - 1}")
        if index >= len(self.dataset):
            return Row(None, FILLER, epoch)
        item = self.dataset[index]
        if not isinstance(item, Mapping) or "input_ids" not in item:
            found = f"has {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"is {type(item).__name__}"
            raise TypeError(f"item {index} of the dataset {found}: a dictionary with input_ids expected")
        return Row(item["input_ids"], index, epoch, item.get("token_type_ids"))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


class EpochCallback(TrainerCallback):
    """Sets the epoch of an EpochDataset that Trainer trains on, before its rows are read."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Compute the epoch as Trainer does when it resumes: from the number of updates."""
        dataset = getattr(train_dataloader, "dataset", None)
        if not isinstance(dataset, EpochDataset):
            raise TypeError(
                f"train_dataset is {type(dataset).__name__}: wrap it in EpochDataset, or drop EpochCallback"
            )
        updates = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        dataset.follow(state.global_step // max(updates, 1))


class MaskingCollator:
    """Data collator: draws the masks of a batch of `Row`s and corrupts its inputs.

    Returns input_ids, attention_mask, labels and, if a row has them, token_type_ids: int64 [B, ≤ L], cut to the longest
    row. Positions of the pad token have attention 0, wherever they are. labels hold the original id at
    predicted positions and IGNORED elsewhere. Importance weights other than 1 are in the upper 32 bits of a label,
    where `masked_lm_loss` finds them; only strategy frequency has such. The rate is constant.
    """

    def __init__(self, masker: Masker, *, pad_id: int, sequence_length: int) -> None:
        self.masker, self.pad_id, self.sequence_length = masker, pad_id, sequence_length

    @classmethod
    def for_corpus(cls, corpus: Corpus | str | Path, *, seed: SupportsIndex, **masking: Any) -> Self:
        """Masks as `maskvr train` draws them on this corpus with this seed and this section `masking`.

        masking: fields of the section as keywords: strategy="span", rate=0.2, span={"max_length": 5}. Raises ValueError
        for settings that are not valid, or not possible here.
        """
        opened = corpus if isinstance(corpus, Corpus) else Corpus(Path(corpus))
        config = _masking_config(masking)
        masker = Masker.for_corpus(
            opened.manifest,
            seed=hashing.fold(operator.index(seed), MASKS),
            **_options(config, corpus_parameters(config, opened)),
        )
        return cls(masker, pad_id=opened.manifest.special_tokens.pad, sequence_length=opened.sequence_length)

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        *,
        sequence_length: int,
        seed: SupportsIndex,
        counts: NDArray[np.int64] | None = None,
        **masking: Any,
    ) -> Self:
        """Masks for rows that were encoded by a fast tokenizer of transformers.

        sequence_length: L, of the longest row. counts: int64 [V], occurrences of each token in the dataset, for
        strategy frequency (np.bincount with minlength V). V is the highest id of the tokenizer plus 1; ids without a
        token are neither predicted nor drawn. masking, raises: as in `for_corpus`; also ValueError for a tokenizer that
        has no mask or pad token of its own.
        """
        config = _masking_config(masking)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__}: a fast tokenizer expected (AutoTokenizer loads one)")
        _check_roles(tokenizer)
        known = set(tokenizer.get_vocab().values())
        vocab_size = max(known) + 1
        with tempfile.TemporaryDirectory() as folder:
            content = json.loads(tokenizer.backend_tokenizer.to_str())
            (Path(folder) / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
            parameters = strategy_parameters(config, Path(folder), vocab_size)
        if config.strategy == "frequency":
            if config.frequency.scores is not None:
                raise ValueError("masking.frequency.scores: is a file for a corpus' tokenizer; use for_corpus")
            if counts is None or config.frequency.document_power:
                raise ValueError(
                    "strategy frequency: needs counts, the occurrences of each token, and document_power 0; with a "
                    "corpus, use for_corpus"
                )
            if counts.shape != (vocab_size,):
                raise ValueError(
                    f"counts has shape {counts.shape}, and the tokenizer {vocab_size} tokens: "
                    f"np.bincount(…, minlength={vocab_size}) counts each of them"
                )
            scores = token_scores(config, np.stack([counts, np.zeros_like(counts)]))
            parameters = replace(parameters, token_scores=torch.from_numpy(scores))
        masker = Masker(
            vocab_size=vocab_size,
            mask_id=tokenizer.mask_token_id,
            special_ids=sorted(set(tokenizer.all_special_ids) | (set(range(vocab_size)) - known)),
            sequence_length=sequence_length,
            seed=hashing.fold(operator.index(seed), MASKS),
            **_options(config, parameters),
        )
        return cls(masker, pad_id=tokenizer.pad_token_id, sequence_length=sequence_length)

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Raises TypeError for items that are no `Row`s, ValueError for a row longer than L, for ids outside the
        vocabulary, and for input_ids or token_type_ids of another shape."""
        ids = torch.full((len(rows), self.sequence_length), self.pad_id)
        types = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            if not isinstance(row, Row):
                raise TypeError(f"items of the dataset are {type(row).__name__}, not Row: wrap it in EpochDataset")
            tokens = torch.as_tensor([] if row.input_ids is None else row.input_ids, dtype=torch.int64)
            if tokens.dim() != 1:
                raise ValueError(
                    f"row {row.sample_id} has input_ids of shape {tuple(tokens.shape)}: a list of ids expected; encode "
                    "texts one at a time without return_tensors"
                )
            if len(tokens) > self.sequence_length:
                raise ValueError(
                    f"row {row.sample_id} has {len(tokens)} tokens, the collator's sequence_length is "
                    f"{self.sequence_length}: truncate the rows, or raise it"
                )
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.masker.vocab_size:
                raise ValueError(
                    f"row {row.sample_id} has ids from {tokens.min()} to {tokens.max()}, the collator's tokenizer from "
                    f"0 to {self.masker.vocab_size - 1}: encode the rows with that tokenizer"
                )
            ids[number, : len(tokens)] = tokens
            if row.token_type_ids is not None:
                given = torch.as_tensor(row.token_type_ids, dtype=torch.int64)
                if given.shape != tokens.shape:
                    raise ValueError(f"row {row.sample_id} has {len(tokens)} tokens and {len(given)} token_type_ids")
                types[number, : len(given)] = given
        sample_ids = torch.tensor([row.sample_id for row in rows])
        masked = self.masker(TokenBatch(ids, sample_ids, torch.tensor([row.epoch for row in rows])))
        # Unused slots have weight 0 and distinct positions, so that they do not overwrite used ones.
        values = torch.where(masked.weights != 0, pack(masked.labels, masked.weights), IGNORED)
        labels = torch.full_like(ids, IGNORED).scatter_(1, masked.positions, values)
        attention = ids != self.pad_id
        # A row without tokens attends to its first position: attention to none is not defined.
        attention[:, 0] = True
        longest = int((attention * torch.arange(1, self.sequence_length + 1)).max())
        batch = {"input_ids": masked.input_ids, "attention_mask": attention.long(), "labels": labels}
        if any(row.token_type_ids is not None for row in rows):
            batch["token_type_ids"] = types
        return {name: column[:, :longest].contiguous() for name, column in batch.items()}


def pack(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """int64: token ids, with the bits of weights float32 other than 1 in the upper half. Same shapes."""
    bits = weights.contiguous().view(torch.int32).long()
    return labels | torch.where(weights == 1, 0, bits << 32)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `pack`: ids int64 and weights float32."""
    bits = (packed >> 32).int()
    return packed & _ID_BITS, torch.where(bits == 0, 1.0, bits.view(torch.float32))


def masked_lm_loss(
    outputs: Mapping[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Σ w ℓ / Σ k, for Trainer's `compute_loss_func`: the loss of `maskvr train`, in fp32.

    outputs: with logits [B, L, V]. labels: of MaskingCollator. num_items_in_batch: Σ k over all micro-batches and
    ranks, as Trainer counts it (with its default average_tokens_across_devices); None: Σ k of these labels. A batch
    without predictions has loss 0.
    """
    predicted = labels != IGNORED
    ids, weights = unpack(labels[predicted])
    losses = F.cross_entropy(outputs["logits"][predicted].float(), ids, reduction="none")
    count = predicted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return (losses * weights).sum() / count.to(losses.device).clamp(min=1)


def _check_roles(tokenizer: Any) -> None:
    """Raise ValueError unless the tokenizer has a mask and a pad token that are nothing else.

    A token that it does not know has the id of the unknown one; a pad token that also ends texts would hide these ends.
    """
    name = type(tokenizer).__name__
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("unk", "cls", "sep", "bos", "eos")}
    for role in ("mask", "pad"):
        add = f'tokenizer.add_special_tokens({{"{role}_token": "[{role.upper()}]"}}), which may need '
        remedy = add + "model.resize_token_embeddings(len(tokenizer))"
        if (own := getattr(tokenizer, f"{role}_token_id")) is None:
            raise ValueError(f"{name}: has no {role} token; call {remedy}")
        if same := [other for other, i in roles.items() if i == own]:
            raise ValueError(f"{name}: id {own} is the {role} token and that of {', '.join(same)}; call {remedy}")
        roles[role] = own


def _masking_config(masking: dict[str, Any]) -> MaskingConfig:
    """The section `masking` of a run. Raises ValueError for settings that are not valid, or not possible here."""
    try:
        config = MaskingConfig.model_validate(masking)
    except ValidationError as error:
        faults = [f"masking.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ValueError("; ".join(faults)) from None
    if config.strategy in ("mapnet", "auto"):
        raise ValueError(f"strategy {config.strategy}: needs gradients of the run, which Trainer has; use maskvr train")
    if config.fully_explored.placement != "across_epochs":
        raise ValueError("placement same_batch: needs a row several times in a batch; use maskvr train")
    if config.late_layer:
        raise ValueError("late_layer: needs the model of the run, which Trainer has; use maskvr train")
    if config.final_rate is not None:
        raise ValueError("final_rate: the collator does not know the step; use maskvr train")
    return config


def _options(config: MaskingConfig, parameters: Parameters) -> dict[str, Any]:
    """Options of Masker."""
    return {
        "strategy": config.strategy,
        "parameters": parameters,
        "rate": config.rate,
        "corruption": Corruption(config.mask_probability, config.random_probability),
    }
