"""Construction of a Masker from the configuration."""

from dataclasses import replace

import torch

from data_pipeline.shards import Corpus
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.vocabulary import frequency_scores, token_counts, word_ends, word_starts
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.masking.strategies import Parameters, Proposal, span_thresholds
from maskvr_ds.runtime import distributed


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
        if (ends := word_ends(corpus.tokenizer_folder, vocab_size)) is not None:
            parameters = replace(parameters, word_ends=torch.from_numpy(ends))
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
