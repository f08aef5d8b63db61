"""Construction of a Masker, and of the network that may propose its masks, from the configuration."""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from data_pipeline.shards import Corpus
from maskvr_ds.config import MapNetConfig, MaskingConfig
from maskvr_ds.data.token_scores import read_token_scores
from maskvr_ds.data.vocabulary import token_counts
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.masking.parameters import counts_passages, strategy_parameters, token_scores
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import Proposal
from maskvr_ds.runtime import distributed


def create_masker(
    masking: MaskingConfig, corpus: Corpus, *, seed: int, device: torch.device, proposal: Proposal | None = None
) -> Masker:
    """Create the run's masker; for `auto`, that of its initial strategy. Collective: call on all ranks.

    proposal: for strategies mapnet and auto.

    Collectives (strategy frequency): one all-reduce of int64 [2, V], each rank's counts over its share of the shards;
    one broadcast of the scores, since powers may round differently on other hardware. With a file of scores, the
    broadcast only: a copy of the file on another node may differ.
    """
    parameters = strategy_parameters(masking, corpus.tokenizer_folder, corpus.manifest.vocab_size, proposal)
    if masking.strategy == "frequency" and (path := masking.frequency.scores) is not None:
        read = distributed.run_collectively(lambda: read_token_scores(path, corpus.manifest))
        parameters = replace(parameters, token_scores=torch.from_numpy(distributed.broadcast_object(read)))
    elif masking.strategy == "frequency":
        mine = range(distributed.rank(), len(corpus.manifest.shards), distributed.world_size())
        of_passages = counts_passages(masking)
        counted = distributed.run_collectively(lambda: token_counts(corpus, mine, of_passages=of_passages))
        counts = distributed.all_reduce_sum(torch.from_numpy(counted).to(device)).cpu().numpy()
        scores = distributed.broadcast_object(token_scores(masking, counts))
        parameters = replace(parameters, token_scores=torch.from_numpy(scores))
    return distributed.run_collectively(
        lambda: Masker.for_corpus(
            corpus.manifest,
            seed=seed,
            strategy="fully_explored" if masking.strategy == "auto" else masking.strategy,
            parameters=parameters,
            rate=masking.rate,
            # Strategy auto decides when the rate falls, and sets it.
            final_rate=None if masking.strategy == "auto" else masking.final_rate,
            corruption=Corruption(masking.mask_probability, masking.random_probability),
            device=device,
        )
    )


def create_proposer(mapnet: MapNetConfig, corpus: Corpus, encoder: PreTrainedConfig, *, seed: int) -> Proposer:
    """A new mask proposal network, on this rank's device, with as many positions as the encoder: it fits the rows of
    all phases."""
    return Proposer(
        mapnet,
        vocab_size=corpus.manifest.vocab_size,
        max_length=encoder.max_position_embeddings,
        seed=seed,
        device=distributed.device(),
    )
