"""Micro-batches of the recipes against the memory that `maskvr plan` expects of them."""

import pytest

from maskvr_ds.config import load_config, recipes
from maskvr_ds.planning.corpora import Corpus
from maskvr_ds.planning.hardware import GPUS, Cluster
from maskvr_ds.planning.plan import make_plan
from maskvr_ds.planning.step_time import Calibration

# Lengths by phase, for which the recipes say to build corpora, and the vocabulary of the tokenizer that they name.
BERT, ROBERTA, MODERNBERT = 30_522, 50_265, 50_368
TWO = dict.fromkeys((f"bert_large_64k_32k{kind}" for kind in ("", "_deepspeed", "_nsp")), (128, 512))
LENGTHS = {
    **TWO,
    "roberta_domain": (512,),
    "modernbert_base": (1024, 1024, 1024, 1024, 8192, 8192),
    "modernbert_domain": (8192,),
}
VOCABULARIES = {"roberta_domain": ROBERTA, "modernbert_base": MODERNBERT, "modernbert_domain": MODERNBERT}
# The sizes of the models that are continued.
CONTINUED = {"roberta_domain": "roberta-base", "modernbert_domain": "modernbert-base"}
# Their micro-batches are those of their source, for 80 GB.
LARGER = {"modernbert_base", "modernbert_domain"}
# For a CPU; of an architecture whose sizes `maskvr plan` does not know.
NOT_PLANNED = {"demo_cpu", "albert_base_4k"}


@pytest.mark.parametrize("name", sorted(set(recipes()) - NOT_PLANNED))
def test_recipe_fits_into_40_gb(name: str) -> None:
    """GPUs, on one node of 8, at a speed close to that of the largest micro-batch."""
    preset = CONTINUED.get(name)
    config = load_config(name, ["model.initialize_from=null", f"model.preset={preset}"] if preset else [])
    corpora = [Corpus(length, VOCABULARIES.get(name, BERT)) for length in LENGTHS.get(name, (128,))]
    gpu = GPUS["a100-80" if name in LARGER else "a100-40"]
    plan = make_plan(config, corpora, Cluster(1, 8, gpu, None), Calibration())
    assert len(plan.phases) == (len(config.phases) or 1)
    for phase in plan.phases:
        assert phase.configured_memory.total <= plan.usable_memory, phase.name
        assert phase.configured_seconds is not None
        # Micro-batches that a recipe has from a source are what they are.
        if not name.endswith("_deepspeed"):
            assert phase.configured_seconds <= 1.05 * phase.step.total, phase.name
