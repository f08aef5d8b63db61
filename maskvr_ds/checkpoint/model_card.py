"""Model card of an export: README.md with the metadata that model hubs read, from a checkpoint and its run's folder.

Figures come from the checkpoint (settings, steps), from metrics.jsonl (held-out figures, hours) and from launches.jsonl
(data, hardware, command). The last two are in the run's folder: of a checkpoint that was copied out of it, and of runs
of earlier versions, the card says "not recorded" instead.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from tokenizers import Tokenizer
from transformers import PretrainedConfig

from data_pipeline.hub import snapshot_name
from maskvr_ds.checkpoint.scores import Score
from maskvr_ds.run_folder.checkpoints import CheckpointState
from maskvr_ds.run_folder.launches import read_launches
from maskvr_ds.run_folder.layout import BERT, CHECKPOINTS, METRICS
from maskvr_ds.telemetry.metrics_file import read_lines

MODEL_CARD = "README.md"
_NOT_RECORDED = "not recorded"
_HELD_OUT = "held_out_"
# Hubs' names of what a task is; of others, text classification.
_TASK_TYPES = {"conll": "token-classification", "squad": "question-answering", "squad_v2": "question-answering"}
# Settings of a checkpoint that say where, not what.
_PLACES = ("model.initialize_from",)


def model_card(
    name: str,
    folder: Path,
    state: CheckpointState,
    config: PretrainedConfig,
    *,
    parameters: int,
    license: str | None,
    scores: Sequence[Score] = (),
) -> str:
    """The text of README.md.

    name: title. folder: of the checkpoint, in its run or alone. config: of the model. parameters: their number.
    license: a hub's identifier, such as apache-2.0; None: the card has no such field, and says so.
    scores: of downstream tasks.
    """
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else None
    lines = [line for line in read_lines(run / METRICS) if line["step"] <= state.step] if run else []
    launches = read_launches(run) if run else []
    figures = _held_out(lines)
    initial = state.settings.get("model.initialize_from")
    base = snapshot_name(initial) if initial else None
    metadata = ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag="fill-mask",
        base_model=base[0] if base else None,
        tags=[config.model_type, "fill-mask", "masked-lm", "maskvr_ds"],
        eval_results=[*_results(figures), *map(_result, scores)] or None,
    )
    sections = (
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name}\n",
        f"`{type_name(config)}` of {parameters:,} parameters, pretrained as a masked language model with maskvr_ds.\n",
        _usage(name),
        _section("Input", _input(folder / BERT, state)),
        _section("Evaluation", _evaluation(figures)),
        *([f"### Downstream tasks\n\n{_downstream(scores)}\n"] if scores else []),
        _section("Training data", _data(launches, state)),
        *([_section("Base model", f"Initialised from `{base[0]}`, commit {base[1]}.")] if base else []),
        _section("Tokenizer", _tokenizer(folder / BERT, config)),
        _section("Training", _training(lines, launches, state)),
        f"### Settings\n\n{_table('setting', _settings(state))}\n",
        _section("Licence", license or "Not stated. Set it with `maskvr export --license`, or here and in the head."),
    )
    return "\n".join(sections)


def type_name(config: PretrainedConfig) -> str:
    """The class of the exported model."""
    return (config.architectures or ["BertForMaskedLM"])[0]


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n"


def _table(first: str, rows: Mapping[str, Any]) -> str:
    body = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return f"| {first} | value |\n|---|---|\n{body}"


def _cell(value: Any) -> str:
    """A value in a table: on one line, without a column separator."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _usage(name: str) -> str:
    return _section(
        "How to use",
        "```python\nfrom transformers import pipeline\n\n"
        f'fill = pipeline("fill-mask", model="{name}")\nprint(fill(f"a {{fill.tokenizer.mask_token}} ."))\n```',
    )


def _input(folder: Path, state: CheckpointState) -> str:
    """With which attention the model was trained, and what that means for its users. folder: of the tokenizer."""
    length = f"{state.identity['sequence_length']:,}"
    # Checkpoints of earlier versions do not name the tokens.
    special = state.identity.get("special_tokens")
    separator = f"`{_token(folder, special['sep'])}`" if special else "a separator"
    last = ", in its last phase" if len(state.phases) > 1 else ""
    # Versions that did not have the setting attended over rows.
    if state.identity.get("data.attention", "rows") == "rows":
        return (
            f"Trained with attention over rows (`data.attention: rows`) of {length} tokens{last}: a token attended to "
            f"its complete row. Where a row held several documents, each closed by {separator}, tokens attended across "
            f"them. Texts of more than {length} tokens are longer than what the model was trained on."
        )
    assert special is not None, "versions with this setting name the tokens"
    first = f"`{_token(folder, special['cls'])}`"
    return (
        f"Trained with attention within documents (`data.attention: documents`){last}: rows of {length} tokens held "
        f"several documents, each closed by {separator}; a token attended to its own document only, and positions "
        "started anew in each. Pass one text per row, as tokenizers do, with padding where texts of a batch differ in "
        "length. Several texts in one row would attend to each other, which this model has never seen: `config.json` "
        f"does not ask for another attention. Only the first document of a row started with {first}. Texts of more "
        f"than {length} tokens are longer than what the model was trained on."
    )


def _token(folder: Path, index: int) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(index) or str(index)


def _held_out(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line's figures of the held-out split by name, with its step; empty if there are none."""
    line = next((line for line in reversed(lines) if line.get(f"{_HELD_OUT}loss") is not None), None)
    if line is None:
        return {}
    found = {key: value for key, value in line.items() if key.startswith(_HELD_OUT) and _is_number(value)}
    return {"step": line["step"], **{key.removeprefix(_HELD_OUT): value for key, value in found.items()}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _results(figures: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="fill-mask",
            dataset_type="held-out",
            dataset_name="held-out split of the training corpus",
            metric_type=name,
            metric_name=f"{_in_words(name)} on the held-out split",
            metric_value=round(value, 6),
        )
        for name, value in figures.items()
        if name != "step"
    ]


def _result(score: Score) -> EvalResult:
    return EvalResult(
        task_type=_TASK_TYPES.get(score.task, "text-classification"),
        dataset_type=score.task,
        dataset_name=score.task,
        metric_type=score.metric,
        metric_name=f"{score.metric}, mean of {score.runs} seed{'s' * (score.runs != 1)}, fine-tuned{_first(score)}",
        metric_value=round(score.mean, 6),
    )


def _first(score: Score) -> str:
    return "" if score.first is None else f", first on {score.first}"


def _downstream(scores: Sequence[Score]) -> str:
    """Table of scores beside what needs no encoder."""
    baselines = list(dict.fromkeys(name for score in scores for name in score.baselines))
    head = ["task", "metric", "training examples", *baselines, "this model", "seeds"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for score in scores:
        spread = "" if score.std is None else f" ± {100 * score.std:.1f}"
        without = [f"{100 * score.baselines[name]:.1f}" if name in score.baselines else "–" for name in baselines]
        mean = f"{100 * score.mean:.1f}{spread}"
        task = f"{score.task}{_first(score)}"
        rows.append([task, score.metric, f"{score.trained_on:,}", *without, mean, str(score.runs)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"Fine-tuned on each task by `maskvr evaluate`. Scores × 100, mean ± standard deviation over seeds.\n\n{table}"
    )


# What the model saw at the positions of a figure.
_SEEN = {"mask": "[MASK]", "kept": "the token itself", "random": "a random token"}


def _in_words(name: str) -> str:
    """A figure's name for readers: loss_mask → "loss where the input is [MASK]"."""
    what, _, kind = name.partition("_")
    return f"{what} where the input is {_SEEN[kind]}" if kind in _SEEN else name.replace("_", " ")


def _evaluation(figures: dict[str, Any]) -> str:
    if not figures:
        return f"Held-out loss: {_NOT_RECORDED}."
    rows: dict[str, Any] = {}
    for name, value in figures.items():
        if name == "loss":
            rows["loss, nats per masked token"] = f"{value:.4f}"
            rows["perplexity"] = f"{math.exp(min(value, 700)):.2f}"
        elif name not in ("step", "perplexity"):
            rows[_in_words(name)] = f"{value:.4f}"
    return f"On the held-out split, at step {figures['step']:,}:\n\n{_table('figure', rows)}"


def _data(launches: list[dict[str, Any]], state: CheckpointState) -> str:
    """Each corpus that was trained on, with its counts, and how much of them was consumed."""
    consumed = sum(entry["steps"] * entry["global_size"] * entry["sequence_length"] for entry in state.phases)
    sequences = f"{state.samples:,} sequence{' was' if state.samples == 1 else 's were'}"
    total = f"{sequences} consumed" + (f", {consumed:,} tokens." if consumed else ".")
    corpora = {
        (corpus["path"], corpus["tokens"]): corpus for launch in launches for corpus in launch.get("corpora", ())
    }
    if not corpora:
        return f"Corpora: {_NOT_RECORDED}. {total}"
    head = "| corpus | weight | documents | tokens | sequences | tokens per sequence |\n|---|---|---|---|---|---|\n"
    rows = []
    for corpus in corpora.values():
        counts = [corpus[key] for key in ("weight", "documents", "tokens", "rows", "sequence_length")]
        rows.append(f"| {' | '.join(_cell(value) for value in (Path(corpus['path']).name, *counts))} |")
        rows += [f"| … {_cell(name)} | | {_cell(count)} | | | |" for name, count in corpus["sources"].items()]
    return f"{head}{chr(10).join(rows)}\n\n{total}"


def _tokenizer(folder: Path, config: PretrainedConfig) -> str:
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "config.json")
    return (
        f"Vocabulary of {config.vocab_size:,} entries; files: {', '.join(f'`{name}`' for name in files)}. Texts are "
        "encoded as they were when the corpus was built."
    )


def _training(lines: list[dict[str, Any]], launches: list[dict[str, Any]], state: CheckpointState) -> str:
    seconds = sum(line.get("step_seconds", 0.0) for line in lines)
    devices = dict.fromkeys(_hardware(launch) for launch in launches)
    versions = {f"{name} {version}": None for launch in launches for name, version in launch["versions"].items()}
    rows = {
        "steps": state.step,
        "hours in steps": f"{seconds / 3600:.2f}" if seconds else _NOT_RECORDED,
        "hardware": "; ".join(devices)
        or f"{state.world_size} rank{'s' * (state.world_size != 1)}; devices {_NOT_RECORDED}",
        "precision, ZeRO stage": f"{state.dtype}, {state.zero_stage}",
        "software": ", ".join(versions) or _NOT_RECORDED,
    }
    commands = list({launch["command"]: None for launch in launches if launch.get("command")})
    shown = "\n".join(commands)
    command = f"```bash\n{shown}\n```" if commands else f"Command: {_NOT_RECORDED}."
    return f"{_table('', rows)}\n\n{command}"


def _hardware(launch: dict[str, Any]) -> str:
    hosts = -(-launch["ranks"] // launch["ranks_per_host"])
    number = launch["ranks"]
    hosts_ = f", {hosts} hosts" if hosts > 1 else ""
    return f"{number} rank{'s' * (number != 1)} on {launch['device']}{hosts_}"


def _settings(state: CheckpointState) -> dict[str, Any]:
    """All settings that the checkpoint stores, flat, without paths."""
    identity = {key: value for key, value in state.identity.items() if key not in ("shards", "mixture", "tokenizer")}
    flat = {**_flat(identity), **_flat(state.settings)}
    return {f"`{key}`": value for key, value in sorted(flat.items()) if key not in _PLACES and value is not None}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
