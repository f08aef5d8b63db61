"""What a run says before its first step and after its last one, for the person who started it. No collectives."""

import shlex
from pathlib import Path

from maskvr_ds.config import RunConfig
from maskvr_ds.masking.checks import effective_predictions
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.run_folder.retention import best_of_phases
from maskvr_ds.telemetry.held_out import held_out_sentence
from maskvr_ds.telemetry.metrics_file import read_lines
from maskvr_ds.training.length import epoch_samples
from maskvr_ds.training.phases import RunPhase
from maskvr_ds.training.setup import PhaseContext


def start_lines(phase: RunPhase, phases: int, context: PhaseContext, world_size: int) -> list[str]:
    """Model, corpus, step, length and output of a phase, a line each; the expected time follows after the first steps
    (`MetricsLog`). phases: of the run."""
    config, state, corpus = phase.config, context.state, context.corpus
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in context.engine.module.parameters())
    size, length = config.batch.global_size, corpus.sequence_length
    steps = config.training.known_steps
    epochs = steps * size / epoch_samples(config, corpus)
    # Strategy auto may repeat rows, each repetition with other masks.
    about = "up to " if config.masking.strategy == "auto" else ""
    held_out = "none" if context.evaluation is None else context.evaluation.described
    where = f"phase {phase.name!r}, {phase.index + 1} of {phases}: " if phase.name else ""
    done = f" from step {state.step:,}, {phase.last_step - state.step:,} to go" if state.step else ""
    folders = len(config.data.corpora)
    saves = config.checkpoint.every_steps
    return [
        _line("model", f"{parameters:,} parameters, {state.dtype}, ZeRO stage {state.zero_stage}"),
        _line(
            "corpus",
            f"{corpus.folder}{f' and {folders - 1} more' if folders > 1 else ''}: "
            f"{_count(corpus.rows, 'row')} of {length:,}, {corpus.manifest.tokens:,} tokens; held out: {held_out}",
        ),
        _line(
            "step",
            f"{_count(size, 'row')} = {size * length:,} tokens: {_count(world_size, 'rank')} × "
            f"{_count(config.accumulation_steps(world_size), 'micro-batch')} of {config.batch.micro_size}",
        ),
        _line("masks", _of_masks(config, context, length)),
        _line(
            "length",
            f"{where}{_count(steps, 'step')} = {steps * size * length:,} tokens = {about}{epochs:,.3g} epochs{done}",
        ),
        _line(
            "output",
            f"{config.output_dir}: checkpoints {f'every {saves:,} steps' if saves else 'at the end'}, metrics.jsonl, "
            "loss.png",
        ),
    ]


def _of_masks(config: RunConfig, context: PhaseContext, length: int) -> str:
    text = f"{config.masking.strategy}: {effective_predictions(config.masking, length - 2)}"
    if context.chooser is None:
        return text
    return f"{text}; now {context.chooser.plan}; {context.chooser.spacing}"


def end_lines(run: RunConfig, phase: RunPhase, step: int, checkpoint: Path) -> list[str]:
    """Where the checkpoint of the last step is, the held-out loss against the unigram entropy, and what to do next.

    phase: the last one. step: reached.
    """
    lines = read_lines(run.output_dir / METRICS)
    found = [_line("done", f"step {step:,}, {checkpoint}")]
    if (last := next((line for line in reversed(lines) if line.get("held_out_loss") is not None), None)) is not None:
        found.append(_line("held out", held_out_sentence(last)))
    if phase.config.checkpoint.keep_best and (best := best_of_phases(run.output_dir, checkpoint)):
        found.append(_line("best", f"{best[-1]}, the checkpoint with the lowest held-out loss"))
    folder = shlex.quote(str(run.output_dir))
    data = phase.config.data
    corpus = data.held_out_path or data.corpora[0].path
    commands = (
        f"maskvr export --checkpoint {folder} --output {shlex.quote(f'{run.output_dir.name}-model')}",
        f"maskvr evaluate {folder} --tasks mlm --data {shlex.quote(str(corpus))}",
        f"maskvr plot {folder}",
    )
    return [*found, *(_line("next" if not number else "", command) for number, command in enumerate(commands))]


def _line(name: str, text: str) -> str:
    return f"{name:<10}{text}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}{'es' if what.endswith('h') else 's'}"
