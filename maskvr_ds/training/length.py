"""Length of the training: `training.epochs` and `training.tokens` as steps. Loads no torch.

For a global batch of B sequences of L tokens, and N slots of an epoch (the rows of a corpus; for a mixture, its rows by
their weights, data/mixture.py), each of which is repeated J times in succession (strategy `fully_explored` with
placement same_batch; otherwise J = 1):

    epochs E   steps = ⌈E · N · J / B⌉
    tokens T   steps = ⌈T / (B · L)⌉

Exact arithmetic on integers and on the decimal that was written, and independent of the number of ranks.
"""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, RunConfig
from maskvr_ds.config.run import raw_values, validated
from maskvr_ds.data.mixture import open_training_corpus, shares
from maskvr_ds.masking.checks import fewer_predictions, sequence_copies
from maskvr_ds.runtime.numbers import MAX_STEPS

logger = logging.getLogger(__name__)

# From this many passes on, a warning: what a model can learn from the corpus it has learnt by then.
MANY_EPOCHS = 100


def epoch_samples(config: RunConfig, corpus: Corpus) -> int:
    """Sequences that a pass over the corpus takes, N · J. With strategy auto: at one copy of each row."""
    return sum(share.slots for share in shares(corpus)) * sequence_copies(config.masking, corpus)


def steps_of(config: RunConfig, corpus: Corpus) -> int:
    """Steps of a configuration without phases. Raises ConfigError if they are not defined, or too many."""
    training, size = config.training, config.batch.global_size
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        given, steps = f"tokens {training.tokens:,}", -(-training.tokens // (size * corpus.sequence_length))
    else:
        given = f"epochs {training.epochs:g}"
        if config.masking.strategy == "auto":
            raise ConfigError(
                f"training.{given}: masking.strategy auto changes during training how often a row is repeated, so that "
                "an epoch has no length; set training.tokens or training.steps"
            )
        exact = Fraction(repr(training.epochs)) * epoch_samples(config, corpus) / size
        steps = -(-exact.numerator // exact.denominator)
    if steps > MAX_STEPS:
        raise ConfigError(f"training.{given}: {steps:,} steps with {corpus.folder}; at most {MAX_STEPS:,}")
    return steps


def with_steps(config: RunConfig, history: Sequence[Mapping[str, Any]] = (), *, finished: bool = False) -> RunConfig:
    """The configuration with training.steps (of each phase) instead of epochs and tokens.

    history: what was trained, one entry per phase (`CheckpointState.phases`); corpora of finished phases are not
    needed. finished: whether the last of these was trained to its end; its corpus is opened if it is still there, since
    the phase may have been made longer. Raises ConfigError and CorpusError, naming the phase, also if the steps do not
    fit other settings.
    """
    if config.training.is_resolved:
        return config
    values = raw_values(config)
    sections = values["phases"] if config.phases else [values]
    for index, (section, (where, phase)) in enumerate(zip(sections, config.named_phases(), strict=True)):
        if phase.training.is_resolved:
            continue
        if index < len(history) - 1:
            steps = history[index]["steps"]
        else:
            gone = finished and index == len(history) - 1 < len(sections) - 1 and not _are_there(phase)
            try:
                steps = history[index]["steps"] if gone else steps_of(phase, open_training_corpus(phase.data))
            except ValueError as error:
                error.args = (f"{where}{error}",)
                raise
            if gone:
                logger.info("%sfinished, with %s steps; its corpus is gone, and not needed", where, f"{steps:,}")
        kept = {key: value for key, value in section["training"].items() if key not in ("epochs", "tokens")}
        section["training"] = {**kept, "steps": steps}
    return validated(values)


def _are_there(phase: RunConfig) -> bool:
    return all(entry.path.exists() for entry in phase.data.corpora)


def remarks(config: RunConfig, corpus: Corpus) -> list[str]:
    """What is probably a mistake in the length or the masks of a resolved configuration without phases, one line
    each."""
    size, samples = config.batch.global_size, epoch_samples(config, corpus)
    found = []
    if size > samples:
        found.append(
            f"batch.global_size {size:,}: larger than an epoch of {corpus.folder}, {samples:,} sequences: a step reads "
            "rows more than once; a smaller batch makes better use of this corpus"
        )
    epochs = config.training.known_steps * size / samples
    if epochs >= MANY_EPOCHS:
        found.append(
            f"training.steps {config.training.known_steps:,}: {epochs:,.0f} epochs of {corpus.folder}; a model "
            "overfits long before; compare the held-out loss with the training loss"
        )
    if (fewer := fewer_predictions(config.masking, corpus)) is not None:
        found.append(fewer)
    return found + config.masking.unread
