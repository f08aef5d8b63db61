"""Construction of a Masker from the configuration, and its validation against the corpus."""

from dataclasses import replace

import torch

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, MaskingConfig, RunConfig
from maskvr_ds.data.vocabulary import frequency_scores, token_counts, word_starts
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.masking.strategies import Parameters, Proposal, segments, span_thresholds
from maskvr_ds.runtime import distributed


def check_masking(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError if the corpus's sequence length, size or vocabulary does not allow the masking settings."""
    masking, longest = config.masking, corpus.sequence_length - 2
    if masking.strategy in ("fully_explored", "auto"):
        if masking.final_rate is not None:
            for n in range(1, longest + 1):
                if (before := segments(n, masking.rate)) != (after := segments(n, masking.final_rate)):
                    raise ConfigError(
                        f"masking.final_rate {masking.final_rate:g}: with strategy {masking.strategy} the rate must "
                        f"not change the number of segments within a round, but rows of {n} tokens would change from "
                        f"{before} to {after}; remove final_rate, or change the rate between phases"
                    )
        if (copies := sequence_copies(masking, corpus)) > (most := segments(longest, masking.rate)):
            raise ConfigError(
                f"masking.fully_explored.segments_per_sequence {copies} exceeds the maximum: a sequence of "
                f"{corpus.sequence_length} tokens has {most} segments at rate {masking.rate:g}"
            )
        if config.batch.global_size % copies:
            below = config.batch.global_size // copies * copies
            sizes = [size for size in (below, below + copies) if size]
            raise ConfigError(
                f"batch.global_size {config.batch.global_size} is not a multiple of {copies}, the number of segments "
                f"of a sequence in one global batch; set it to {' or '.join(str(b) for b in sizes)}, or "
                "masking.fully_explored.segments_per_sequence to a divisor of it"
            )
    if masking.strategy == "auto" and masking.auto.rows > corpus.rows:
        raise ConfigError(f"masking.auto.rows {masking.auto.rows}: {corpus.folder} has only {corpus.rows} rows")
    if masking.strategy in ("whole_word", "span"):
        word_starts(corpus.tokenizer_folder, corpus.manifest.vocab_size)


def sequence_copies(masking: MaskingConfig, corpus: Corpus) -> int:
    """J: copies of a row in a global batch; by default (placement same_batch) one per segment of a full row."""
    if masking.fully_explored.placement != "same_batch":
        return 1
    return masking.fully_explored.segments_per_sequence or segments(corpus.sequence_length - 2, masking.rate)


def create_masker(
    masking: MaskingConfig, corpus: Corpus, *, seed: int, device: torch.device, proposal: Proposal | None = None
) -> Masker:
    """Create the run's masker; for `auto`, that of its initial strategy. Collective: call on all ranks.

    proposal: for strategies mapnet and auto.

    Collectives (strategy frequency): one all-reduce of int64 [2, V], each rank's counts over its share of the shards;
    one broadcast of the scores, since powers may round differently on other hardware.
    """
    parameters = Parameters(
        sampler=masking.weighted.sampler,
        estimator=masking.weighted.estimator,
        floor=masking.frequency.floor,
        proposal=proposal,
    )
    vocab_size = corpus.manifest.vocab_size
    if masking.strategy in ("whole_word", "span"):
        starts = torch.from_numpy(word_starts(corpus.tokenizer_folder, vocab_size))
        thresholds = span_thresholds(masking.span.geometric_p, masking.span.max_length)
        parameters = replace(parameters, word_starts=starts, span_thresholds=thresholds)
    if masking.strategy == "frequency":
        mine = range(distributed.rank(), len(corpus.manifest.shards), distributed.world_size())
        of_passages = masking.frequency.document_power != 0
        counted = distributed.run_collectively(lambda: token_counts(corpus, mine, of_passages=of_passages))
        counts = distributed.all_reduce_sum(torch.from_numpy(counted).to(device)).cpu().numpy()
        powers = masking.frequency.power, masking.frequency.document_power
        scores = distributed.broadcast_object(frequency_scores(counts, *powers))
        parameters = replace(parameters, token_scores=torch.from_numpy(scores))
    return distributed.run_collectively(
        lambda: Masker.for_corpus(
            corpus.manifest,
            seed=seed,
            strategy="fully_explored" if masking.strategy == "auto" else masking.strategy,
            parameters=parameters,
            rate=masking.rate,
            final_rate=masking.final_rate,
            corruption=Corruption(masking.mask_probability, masking.random_probability),
            device=device,
        )
    )
