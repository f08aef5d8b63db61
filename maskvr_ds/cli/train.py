"""`maskvr train`."""

import argparse

from maskvr_ds.cli.options import Commands, add_command, check_ranks_here, check_start, visible_gpus
from maskvr_ds.runtime.hostfile import read_hostfile
from maskvr_ds.runtime.logs import verbosity_words
from maskvr_ds.runtime.numbers import MAX_SLOTS, integer

_DESCRIPTION = """\
Start or resume pretraining. A run can resume with any number of ranks and any ZeRO stage.

Exit status: 0 completed; 1 error; 75 stopped by Ctrl-C (SIGINT), SIGTERM, SIGUSR1 or SIGHUP with a
checkpoint: repeat the command with --resume auto to continue. A second Ctrl-C ends the run at
once, without a checkpoint."""
_EXAMPLES = """\
maskvr train --config bert_base_4k --set data.path=corpus --set output_dir=runs/base --num-gpus 8
maskvr train --config run.yaml --hostfile hosts --resume auto"""


def add_train(commands: Commands) -> None:
    """Add `maskvr train`."""
    from maskvr_ds.config import add_run_options

    parser = add_command(commands, "train", "start or resume pretraining", examples=_EXAMPLES, description=_DESCRIPTION)
    add_run_options(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--num-gpus",
        type=integer(1, MAX_SLOTS),
        metavar="N",
        help="ranks on this machine (default: its number of GPUs, or 1 without GPU)",
    )
    where.add_argument("--hostfile", metavar="FILE", help="DeepSpeed hostfile: one `host slots=N` per line")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import ConfigError, load_config, with_local_model
    from maskvr_ds.reliability import launch
    from maskvr_ds.run_folder.fence import Fence
    from maskvr_ds.run_folder.marks import is_run, output_fault

    # Report an invalid value once, before any rank starts.
    arguments.assignments = with_local_model(arguments.config, arguments.assignments)
    config = load_config(arguments.config, arguments.assignments)
    Fence(config.output_dir).look()
    if (fault := output_fault(config.output_dir, arguments.resume)) is not None:
        raise ConfigError(fault)
    options = ["--config", arguments.config]
    for assignment in arguments.assignments:
        options += ["--set", assignment]
    if arguments.resume:
        options += ["--resume", arguments.resume]
    options += verbosity_words(arguments.verbosity)
    if arguments.hostfile:
        # The corpora are on the hosts, perhaps not here.
        check_start(config, sum(read_hostfile(arguments.hostfile).values()), files=False)
        # It puts values in single quotes on a shell's command line without escaping quotes within them.
        if quoted := next((word for word in options if "'" in word), None):
            raise ConfigError(
                f"{quoted!r}: DeepSpeed's launcher cannot pass values that contain a single quote; put the value in "
                "the YAML file, or use python -m cluster launch"
            )
        # force_multi: otherwise, for a hostfile with a single host, DeepSpeed trains on this machine.
        words = ["--force_multi", "--hostfile", arguments.hostfile, "--module", "maskvr_ds.train", *options]
        return launch.launch(words, config.output_dir, config.training.steps)
    ranks = arguments.num_gpus or max(1, visible_gpus())
    check_ranks_here(ranks)
    check_start(config, ranks, files=not is_run(config.output_dir) and arguments.resume in (None, "auto"))
    if ranks > 1:
        return launch.launch_here("maskvr_ds.train", options, ranks, config.output_dir, config.training.steps)
    from maskvr_ds import train

    return train.main(options)
