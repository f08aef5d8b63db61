"""Parameters of the masking strategies, made from the configuration, a tokenizer and token counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.token_scores import read_token_scores
from maskvr_ds.data.vocabulary import frequency_scores, token_counts, word_ends, word_starts
from maskvr_ds.masking.strategies import Parameters, Proposal, span_thresholds


def strategy_parameters(
    masking: MaskingConfig, tokenizer: Path, vocab_size: int, proposal: Proposal | None = None
) -> Parameters:
    """All parameters but the token scores of `frequency`. tokenizer: folder with tokenizer.json, read for words only.

    Raises ValueError if the strategy needs words and the tokenizer does not mark them.
    """
    parameters = Parameters(
        sampler=masking.weighted.sampler,
        estimator=masking.weighted.estimator,
        floor=masking.frequency.floor,
        proposal=proposal,
    )
    if masking.strategy in ("whole_word", "span"):
        starts = torch.from_numpy(word_starts(tokenizer, vocab_size))
        p = masking.span.geometric_p if masking.span.lengths == "geometric" else None
        thresholds = span_thresholds(p, masking.span.max_length)
        parameters = replace(parameters, word_starts=starts, span_thresholds=thresholds)
        if (ends := word_ends(tokenizer, vocab_size)) is not None:
            parameters = replace(parameters, word_ends=torch.from_numpy(ends))
    return parameters


def token_scores(masking: MaskingConfig, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [V]: scores of `frequency` from int64 [2, V], occurrences of each token and passages that contain it."""
    return frequency_scores(counts, masking.frequency.power, masking.frequency.document_power)


def counts_passages(masking: MaskingConfig) -> bool:
    """Whether the scores depend on the number of passages, which takes longer to count."""
    return masking.frequency.document_power != 0


def corpus_parameters(masking: MaskingConfig, corpus: Corpus) -> Parameters:
    """All parameters, with tokens counted in the whole corpus by this process (`create_masker` divides it among the
    ranks of a run)."""
    parameters = strategy_parameters(masking, corpus.tokenizer_folder, corpus.manifest.vocab_size)
    if masking.strategy == "frequency" and (path := masking.frequency.scores) is not None:
        scores = read_token_scores(path, corpus.manifest)
        parameters = replace(parameters, token_scores=torch.from_numpy(scores))
    elif masking.strategy == "frequency":
        shards = range(len(corpus.manifest.shards))
        counts = token_counts(corpus, shards, of_passages=counts_passages(masking))
        parameters = replace(parameters, token_scores=torch.from_numpy(token_scores(masking, counts)))
    return parameters
