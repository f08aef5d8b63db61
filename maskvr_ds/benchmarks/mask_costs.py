"""`maskvr benchmark strategy-cost --config`: seconds of a step per candidate of masking.strategy auto, for
masking.auto.costs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from maskvr_ds.config import ConfigError, load_config, run_deepspeed_config
from maskvr_ds.models.initial_folder import table_rows
from maskvr_ds.runtime import distributed
from maskvr_ds.training.corpora import open_and_verify
from maskvr_ds.training.length import with_steps
from maskvr_ds.training.mask_costs import machine, measure_costs, needed
from maskvr_ds.training.phases import plan
from maskvr_ds.training.setup import encoder_config, trial_engine


def run_costs(config: str, assignments: Sequence[str], rounds: int) -> dict[str, Any]:
    """The costs of a run's first phase, in the form of masking.auto.costs. Under a launcher, on all its ranks.

    rounds: timed steps of each candidate. Raises ConfigError for a configuration that is faulty or not of strategy
    auto.
    """
    distributed.initialize()
    run = distributed.run_collectively(lambda: load_config(config, assignments))
    if not run.training.is_resolved:
        run = distributed.run_on_rank0(lambda: with_steps(run))
    phase = plan(run)[0]
    if (strategy := phase.config.masking.strategy) != "auto":
        raise ConfigError(
            f"{config}: masking.strategy is {strategy}, which has no candidates; add --set masking.strategy=auto"
        )
    deepspeed_config = distributed.run_collectively(lambda: run_deepspeed_config(run))
    corpus, _ = open_and_verify(phase)
    folder = phase.config.model.initialize_from
    rows = None if folder is None else distributed.run_on_rank0(lambda: table_rows(folder))
    encoder = distributed.run_collectively(lambda: encoder_config(phase.config.model, corpus, rows))
    here = machine(phase.config, corpus, deepspeed_config)
    trial = partial(trial_engine, phase, corpus, encoder, deepspeed_config)
    return measure_costs(phase.config, corpus, needed(phase.config, corpus), here, trial, rounds).stored()
