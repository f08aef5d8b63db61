"""`maskvr train`."""

import argparse
import re
from pathlib import Path

from maskvr_ds.cli.options import positive_integer, visible_gpus
from maskvr_ds.runtime.logs import verbosity_words


def add_train(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config import add_run_options

    parser = commands.add_parser(
        "train",
        help="pretrain, or go on with a run",
        description="Pretrain, or go on with a run, on any number of ranks and at any ZeRO stage.",
        epilog="exit status: 0 done; 1 error; 75 stopped by SIGTERM, SIGUSR1 or SIGHUP, with a checkpoint, "
        "to go on with the same command and --resume auto",
    )
    add_run_options(parser)
    parser.add_argument(
        "--num-gpus", type=positive_integer, metavar="N", help="ranks on this machine; default: its GPUs, or 1"
    )
    parser.add_argument("--hostfile", metavar="FILE", help="DeepSpeed's hostfile: one `host slots=N` a line")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import ConfigError, load_config
    from maskvr_ds.reliability import launch

    # A wrong value is told here, once, before any rank starts.
    config = load_config(arguments.config, arguments.assignments)
    options = ["--config", arguments.config]
    for assignment in arguments.assignments:
        options += ["--set", assignment]
    if arguments.resume:
        options += ["--resume", arguments.resume]
    options += verbosity_words(arguments.verbosity)
    if arguments.hostfile:
        # DeepSpeed runs locally, as a world of one machine, where the file it is given does not exist.
        _check_hostfile(Path(arguments.hostfile))
        # It puts values between single quotes into a shell's command line, and does not look for such within them.
        if found := next((word for word in options if "'" in word), None):
            raise ConfigError(
                f"{found!r}: a single quote does not come through DeepSpeed's launcher; put the value in the YAML "
                "file, or use python -m cluster launch"
            )
        # force_multi: a single host is a host too, where DeepSpeed would train on this machine instead.
        words = ["--force_multi", "--hostfile", arguments.hostfile, "--module", "maskvr_ds.train", *options]
        return launch.launch(words, config.output_dir, config.training.steps)
    ranks = arguments.num_gpus or visible_gpus()
    if ranks > 1:
        return launch.launch_here("maskvr_ds.train", options, ranks, config.output_dir, config.training.steps)
    from maskvr_ds import train

    return train.main(options)


def _check_hostfile(path: Path) -> None:
    from maskvr_ds.config import ConfigError

    if not path.is_file():
        raise ConfigError(f"--hostfile {path}: no such file; one `host slots=N` a line expected")
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if entry and not re.fullmatch(r"\S+\s+slots=[1-9]\d*", entry):
            raise ConfigError(f"--hostfile {path}, line {number}: {entry!r} is not `host slots=N`")
