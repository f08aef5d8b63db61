"""`maskvr plan`."""

import argparse
import json
import sys
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.runtime.numbers import MAX_NODES, MAX_SLOTS, integer

_DESCRIPTION = """\
Plan a run on a cluster before it starts: micro-batch and accumulation, memory per GPU by ZeRO
stage, time of a step by part, tokens per second, days and energy, and the efficiency on 8 to 512
GPUs. A model, not a measurement: docs/explanation/planning.md states every assumption.

Corpora that do not exist yet are described by --sequence-length and --vocab-size."""
_EXAMPLES = """\
maskvr plan --config run.yaml --nodes 4 --gpus-per-node 8 --gpu h100 --link 8x400G
maskvr plan --config bert_base_4k --nodes 1 --gpus-per-node 8 --gpu a100-80 --sequence-length 128 --vocab-size 30522
maskvr plan --config run.yaml --nodes 1 --gpus-per-node 1 --gpu h100 --measured train.json --json"""


def add_plan(commands: Commands) -> None:
    """Add `maskvr plan`."""
    parser = add_command(
        commands,
        "plan",
        "memory, time and energy of a run on a cluster, before it starts",
        examples=_EXAMPLES,
        description=_DESCRIPTION,
    )
    _plan_options(parser)
    parser.set_defaults(run=_plan)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    from maskvr_ds.config import add_config_options
    from maskvr_ds.planning.hardware import GPUS, LINKS

    add_config_options(parser)
    parser.add_argument("--nodes", type=integer(1, MAX_NODES), required=True, metavar="N", help="number of nodes")
    parser.add_argument(
        "--gpus-per-node", type=integer(1, MAX_SLOTS), required=True, metavar="G", help="GPUs of each node"
    )
    parser.add_argument("--gpu", choices=list(GPUS), required=True, help="kind of GPU")
    parser.add_argument(
        "--link",
        metavar="LINK",
        help=f"bandwidth between nodes: {', '.join(LINKS)}, or Gbit/s per node and direction; required with --nodes "
        "above 1, and for more GPUs than a node has in the table of efficiency",
    )
    parser.add_argument(
        "--measured",
        nargs="+",
        metavar="FILE",
        help="results of `maskvr benchmark training-speed --output` on this kind of GPU, to calibrate with",
    )
    parser.add_argument(
        "--sequence-length",
        type=integer(8, 2**20),
        nargs="+",
        metavar="L",
        help="tokens per sequence, one value or one per phase (default: the corpora's)",
    )
    parser.add_argument(
        "--vocab-size", type=integer(8, 2**31), metavar="V", help="size of the vocabulary (default: the corpora's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all figures in bytes and seconds")
    parser.add_argument("--plot", metavar="FILE", help="also draw the efficiency as a PNG")


def _plan(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import load_config, with_local_model
    from maskvr_ds.config.architectures import CONFIG_FILE
    from maskvr_ds.planning import report
    from maskvr_ds.planning.calibration import calibrate, read_measurements
    from maskvr_ds.planning.corpora import corpora_of
    from maskvr_ds.planning.hardware import GPUS, Cluster, link_bytes
    from maskvr_ds.planning.plan import make_plan
    from maskvr_ds.planning.step_time import Calibration
    from maskvr_ds.runtime.files import check_output_file
    from maskvr_ds.training.length import with_steps

    if arguments.plot:
        check_output_file(arguments.plot, "--plot")
    # Of a model to start from, its sizes.
    assignments = with_local_model(arguments.config, arguments.assignments, (CONFIG_FILE,))
    config = load_config(arguments.config, assignments)
    if not arguments.sequence_length or not arguments.vocab_size:
        config = with_steps(config)
    gpu, calibration = GPUS[arguments.gpu], Calibration()
    link = None if arguments.link is None else link_bytes(arguments.link)
    measured = arguments.measured or []
    if measured:
        gpu, calibration = calibrate([one for path in measured for one in read_measurements(Path(path))], gpu)
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node, gpu, link)
    corpora = corpora_of(config, arguments.sequence_length, arguments.vocab_size)
    plan = make_plan(config, corpora, cluster, calibration)
    if arguments.json:
        json.dump({"config": arguments.config, "measured": measured, **plan.dump()}, sys.stdout, indent=1)
        print()
    else:
        given = {"--sequence-length": arguments.sequence_length, "--vocab-size": arguments.vocab_size}
        options = [name for name, value in given.items() if value is not None]
        paths = dict.fromkeys(str(one.path) for _, phase in config.named_phases() for one in phase.data.corpora)
        read = "not read" if len(options) == len(given) else ", ".join(paths)
        sources = f"{read}; {' and '.join(options)}" if options else read
        print(report.text(plan, source=arguments.config, measured=measured, corpora=sources))
    if arguments.plot:
        report.plot(plan, Path(arguments.plot))
    return 0
