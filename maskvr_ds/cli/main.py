"""The command `maskvr`. Heavy imports wait for the command that needs them, so that --help is quick."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from maskvr_ds.cli import checkpoint

EXAMPLES = """examples:
  maskvr config --config run.yaml --set batch.micro_size=32
  maskvr train --config run.yaml
  maskvr train --config demo_cpu --num-gpus 2 --set data.path=corpus --set output_dir=runs/first
  maskvr train --config run.yaml --hostfile hosts --resume auto
  maskvr checkpoint verify runs/first
  maskvr export --checkpoint runs/first --output bert-mine
  maskvr variance --checkpoint runs/first --corpus corpus --strategies whole_word span --output variance
  maskvr compare --config run.yaml --strategies uniform span --seeds 0 1 2 --output comparison
  maskvr benchmark masking
  maskvr demo --output demo_run
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="maskvr",
        description="Variance-reduced BERT pretraining on DeepSpeed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, checkpoint.add_parser, _add_export, _add_plot, _add_recipes, _add_config):
        add(commands)
    for add in (_add_variance, _add_compare, _add_benchmark, _add_demo):
        add(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "deepspeed", "transformers", "safetensors", "matplotlib", "psutil"):
            raise
        print(f"error: {error.name} is not installed; pip install 'maskvr_ds[train]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_train(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config import add_run_options

    parser = commands.add_parser(
        "train",
        help="pretrain, or go on with a run",
        description="Pretrain, or go on with a run, on any number of ranks and at any ZeRO stage.",
        epilog="exit status: 0 done; 1 error; 75 stopped by SIGTERM, SIGUSR1 or SIGHUP, with a checkpoint, "
        "to go on with the same command and --resume auto",
    )
    add_run_options(parser)
    parser.add_argument("--num-gpus", type=_count, metavar="N", help="ranks on this machine; default: its GPUs, or 1")
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
    ranks = arguments.num_gpus or _visible_gpus()
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


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 expected")
    return int(text)


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write a checkpoint as a Hugging Face model")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run (its newest one)")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for model and tokenizer")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from maskvr_ds.checkpoint.export import export

    difference = export(arguments.checkpoint, arguments.output)
    print(f"{arguments.output}: BertForMaskedLM and tokenizer; logits within {difference:.2g} of the engine's")
    return 0


def _add_plot(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plot", help="draw the loss curves of a run")
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", metavar="FILE", help="default: RUN/loss.png")
    parser.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> int:
    from maskvr_ds.telemetry.metrics import METRICS, plot_loss

    run = Path(arguments.run_folder)
    if not (run / METRICS).is_file():
        raise ValueError(f"{run}: no {METRICS} there; a run's folder expected")
    output = Path(arguments.output or run / "loss.png")
    plot_loss(run / METRICS, output)
    print(output)
    return 0


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("recipes", help="list the recipes, or print one to start your own run.yaml from")
    parser.add_argument("name", nargs="?", help="print this recipe")
    parser.set_defaults(run=_recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import recipe_text, recipes

    print(recipe_text(arguments.name) if arguments.name else "\n".join(recipes()))
    return 0


def _add_config(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config import add_config_options

    parser = commands.add_parser("config", help="check a run's configuration and print it whole, defaults included")
    add_config_options(parser)
    parser.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import dump_config, load_config

    print(dump_config(load_config(arguments.config, arguments.assignments)), end="")
    return 0


_VARIANCE_EXAMPLES = """examples:
  maskvr variance --checkpoint runs/first --corpus corpus --output variance \\
      --strategies frequency fully_explored:placement=same_batch,segments_per_sequence=3 whole_word
  maskvr variance --checkpoint runs/mapnet/checkpoints/step-00004000 --corpus corpus --output variance --num-gpus 8 \\
      --strategies mapnet mapnet:floor=0.1 oracle_gradient:floor=0.1 oracle_head oracle_mask --hamming-rounds 8
"""


def _add_variance(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config.strategy_spec import add_variance_options

    parser = commands.add_parser(
        "variance",
        help="measure the gradient's variance from data and from masks, strategy by strategy",
        epilog=_VARIANCE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_variance_options(parser)
    parser.add_argument("--num-gpus", type=_count, metavar="N", help="ranks on this machine; default: its GPUs, or 1")
    parser.set_defaults(run=_variance)


def _variance(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config.strategy_spec import parse_strategies

    parse_strategies(arguments.strategies)
    options = []
    for name, value in vars(arguments).items():
        if name not in ("run", "num_gpus"):
            options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    ranks = arguments.num_gpus or _visible_gpus()
    if ranks <= 1:
        from maskvr_ds.analysis.gradient_variance import measure

        return measure.main(options)
    from maskvr_ds.reliability import launch

    return launch.run_here("maskvr_ds.analysis.gradient_variance.measure", options, ranks)


_COMPARE_EXAMPLES = """examples:
  maskvr compare --config run.yaml --set data.path=corpus --seeds 0 1 2 --output comparison \\
      --strategies uniform mapnet:gate=auto fully_explored fully_explored:placement=same_batch
  maskvr compare --config run.yaml --strategies uniform uniform:optimizer.lr=0.02 --target 2.5 --output rates
"""


def _add_compare(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config import add_config_options

    parser = commands.add_parser(
        "compare",
        help="train strategies × seeds; steps and seconds to the first one's held-out loss",
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser, of=" in all runs")
    parser.add_argument(
        "--strategies",
        nargs="+",
        required=True,
        metavar="STRATEGY",
        help="name, or name:setting=value,setting=value (of masking, of mapnet for it, or section.field); the first "
        "is the baseline",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--output", required=True, metavar="DIR", help="runs there that are done are not repeated")
    parser.add_argument("--target", type=float, metavar="LOSS", help="default: the baseline's last one, seed by seed")
    parser.add_argument("--num-gpus", type=_count, metavar="N", help="ranks of each run; default: as `maskvr train`")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from maskvr_ds.benchmarks import compare

    return compare.run(arguments)


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config.model import PRESETS

    parser = commands.add_parser("benchmark", help="measure loader, masks, optimizer or training steps on this machine")
    parser.add_argument("what", choices=["loader", "masking", "masks", "lamb", "train"])
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="bert-base",
        help="train, lamb, masks: model size (default: bert-base)",
    )
    parser.add_argument(
        "--deepspeed", default="zero1_bf16", help="train, lamb, masks: a DeepSpeed config (default: zero1_bf16)"
    )
    parser.add_argument(
        "--micro-size", type=int, default=128, help="train, masks: sequences a forward pass (default: 128)"
    )
    parser.add_argument("--steps", type=int, default=100, help="train: optimizer steps (default: 100)")
    parser.add_argument("--sequence-length", type=int, default=128, help="L (default: 128)")
    parser.add_argument("--strategy", default="uniform", help="masking: a masking.strategy (default: uniform)")
    parser.add_argument("--rounds", type=int, default=15, help="lamb, masks: timed steps of each (default: 15)")
    parser.add_argument("--threads", type=int, help="lamb, masks: CPU threads a rank (default: all there are)")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=["adamw_foreach", "fused_adam", "fused_lamb"],
        help="lamb: what to compare with; the fused ones need a GPU (default: all that can run here)",
    )
    parser.set_defaults(run=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> int:
    from maskvr_ds.benchmarks import training

    return training.run(arguments)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="text to exported model in five minutes on two cores")
    parser.add_argument("--output", default="demo_run", metavar="DIR", help="made anew at each start")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from maskvr_ds.demo import demo

    return demo(Path(arguments.output))


if __name__ == "__main__":
    sys.exit(main())
