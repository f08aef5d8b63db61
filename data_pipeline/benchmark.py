"""Benchmark of `build`: tokens per CPU-second and per second, against the bare tokenizer and other pipelines.

    python -m data_pipeline.benchmark --input texts/ --tokenizer tok/ --workers 1 2 --datatrove-python PYTHON

Candidates process the same text in alternation, each in fresh single-threaded processes:

    build       the complete command: interpreter start, reading, hashing, tokenization, packing, writing
    encode      encode_batch_fast of `tokenizers` alone, in one process: only the calls, with documents in memory
    datasets    as in run_mlm.py of transformers: map(tokenizer), map(group_texts), save_to_disk; complete process
    datatrove   DocumentTokenizer, unshuffled, on the same documents in .jsonl; complete process. Needs
                --datatrove-python, an interpreter with datatrove and tokenizers
    lddl        NVIDIA's preprocess_bert_pretrain, one document per line, each used once; complete process. It makes
                pairs for next-sentence prediction: compare with --packing nsp. Needs --lddl-python, an interpreter
                with lddl, its requirements and NLTK's sentence splitter

CPU time is user + system time of all processes. Tokens are those of the text without special tokens, the same number
for all candidates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.manifest import PACKINGS
from data_pipeline.numbers import integer
from data_pipeline.shards import read_manifest
from data_pipeline.sources.documents import batches, read_documents
from data_pipeline.sources.inputs import Piece, find_sources
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer

WAYS = ("build", "encode", "datasets")
# Script for an interpreter in which this project may not be installed.
_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    documents, tokenizer, folder, workers = sys.argv[1:]
    tokenize = DocumentTokenizer(folder + "/tokens", tokenizer + "/tokenizer.json", shuffle_documents=False)
    steps = [JsonlReader(documents), tokenize]
    # spawn: the CPU time of processes started by a fork server is not accounted to this process.
    LocalPipelineExecutor(steps, tasks=int(workers), logging_dir=folder + "/logs", start_method="spawn").run()
"""
# LDDL's entry point, which may not be on PATH.
_LDDL = "from lddl.dask.bert.pretrain import console_script; console_script()"


def _documents(inputs: Sequence[str]) -> Iterator[tuple[str, bool]]:
    for source in find_sources(inputs):
        piece = Piece(0, 0, source.bytes)
        yield from read_documents(source, piece, "blank-line", "text", lambda *_: None)


def _build(
    inputs: Sequence[str], tokenizer: str, length: int, folder: Path, workers: int, packing: str
) -> dict[str, Any]:
    from data_pipeline.build import build

    build(inputs, tokenizer, length, folder / "corpus", workers=workers, packing=packing, progress=False)
    return {}


def _encode(inputs: Sequence[str], tokenizer: str, length: int, folder: Path, workers: int) -> dict[str, Any]:
    encoder = Encoder(tokenizer)
    texts = [batch for batch, _ in batches(_documents(inputs), 1 << 20)]
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = sum(sum(map(len, encoder.tokenizer.encode_batch_fast(b, add_special_tokens=False))) for b in texts)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "tokens": tokens}


def _datasets(inputs: Sequence[str], tokenizer: str, length: int, folder: Path, workers: int) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    words = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return words(examples["text"], return_special_tokens_mask=True)

    def group_texts(examples: dict[str, Iterable[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // length * length
        return {key: [ids[i : i + length] for i in range(0, total, length)] for key, ids in joined.items()}

    raw = datasets.load_dataset(
        "text", data_files=list(inputs), sample_by="paragraph", split="train", cache_dir=str(folder / "cache")
    )
    processes = workers if workers > 1 else None
    tokenized = raw.map(tokenize, batched=True, remove_columns=["text"], num_proc=processes)
    tokenized.map(group_texts, batched=True, num_proc=processes).save_to_disk(str(folder / "saved"), num_proc=processes)
    return {}


def _write_documents(inputs: Sequence[str], peer: str, folder: Path, files: int) -> None:
    """Write the documents as input of a peer, to files of about equal size: datatrove parallelises over files."""
    folder.mkdir(parents=True)
    texts = [text for text, _ in _documents(inputs)]
    share = sum(map(len, texts)) / files
    position = 0
    suffix = "jsonl" if peer == "datatrove" else "txt"
    outputs = [(folder / f"{i}.{suffix}").open("w", encoding="utf-8") for i in range(files)]
    for number, text in enumerate(texts):
        if peer == "datatrove":
            line = json.dumps({"text": text}, ensure_ascii=False)
        else:
            line = f"document-{number} {' '.join(text.split())}"
        outputs[min(int(position / share), files - 1)].write(line + "\n")
        position += len(text)
    for output in outputs:
        output.close()


def _datatrove_command(python: str, texts: Path, tokenizer: Path, folder: Path, workers: int) -> list[str]:
    (folder / "peer.py").write_text(_DATATROVE, encoding="utf-8")
    return [python, str(folder / "peer.py"), str(texts), str(tokenizer), str(folder), str(workers)]


def _lddl_command(python: str, texts: Path, tokenizer: Path, folder: Path, workers: int) -> list[str]:
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_bytes())["model"]["vocab"]
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get))
    (folder / "vocab.txt").write_text(lines, encoding="utf-8")
    options = {
        "books": texts,
        "sink": folder / "pairs",
        "vocab-file": folder / "vocab.txt",
        "schedule": "local",
        "local-n-workers": workers,
        # A few tasks per worker, to balance the load.
        "num-blocks": 4 * workers,
        "duplicate-factor": 1,
        "sample-ratio": 1.0,
    }
    return [python, "-c", _LDDL, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


_PEERS = {"datatrove": _datatrove_command, "lddl": _lddl_command}


def _measure(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a command in a fresh process; returns its CPU seconds (cpu), seconds (wall), and the values it printed."""
    one_thread = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "DASK_TEMPORARY_DIRECTORY": str(folder),  # LDDL writes to the working directory by default
    }
    start = time.perf_counter()
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            command, env=os.environ | one_thread, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        errors_tail = (folder / "errors").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}: {errors_tail}")
    measured = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - start}
    return measured | (json.loads(lines[-1]) if (lines := output.splitlines()) and lines[-1].startswith("{") else {})


def _table(rates: dict[tuple[str, int], list[float]]) -> None:
    for (way, workers), values in rates.items():
        print(f"{way:12} {workers} {min(values):10.0f} {statistics.median(values):8.0f} {max(values):8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--input", nargs="+", required=True, help="text files, with documents separated by blank lines")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--sequence-length", type=integer, default=128)
    parser.add_argument("--rounds", type=integer, default=3)
    parser.add_argument("--workers", type=integer, nargs="+", default=[1], help="numbers of processes to measure")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="candidates to measure (default: all)")
    parser.add_argument("--packing", choices=PACKINGS, default="full_sequences", help="packing of build")
    parser.add_argument("--datatrove-python", metavar="PYTHON", help="interpreter with datatrove; also measures it")
    parser.add_argument("--lddl-python", metavar="PYTHON", help="interpreter with lddl; also measures it")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    inputs, length = arguments.input, arguments.sequence_length
    if arguments.run:
        build = partial(_build, packing=arguments.packing)
        run: dict[str, Callable[..., dict[str, Any]]] = {"build": build, "encode": _encode, "datasets": _datasets}
        made = run[arguments.run](inputs, arguments.tokenizer, length, arguments.folder, arguments.workers[0])
        print(json.dumps(made))
        return

    peers = {name: python for name in _PEERS if (python := getattr(arguments, f"{name}_python"))}
    ways = [*arguments.ways, *peers]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer")
        copy_tokenizer(arguments.tokenizer, tokenizer)
        tokens = _encode(inputs, str(tokenizer), length, tokenizer, 1)["tokens"]
        for peer, workers in itertools.product(peers, arguments.workers):
            _write_documents(inputs, peer, Path(scratch, f"{peer}{workers}"), workers)
        for round_, workers, way in (
            (r, w, way) for r in range(arguments.rounds) for w in arguments.workers for way in ways
        ):
            if way == "encode" and workers > 1:
                continue
            with tempfile.TemporaryDirectory(dir=scratch) as name:
                folder = Path(name)
                command = [sys.executable, "-m", "data_pipeline.benchmark", "--input", *inputs]
                command += ["--tokenizer", str(tokenizer), "--sequence-length", str(length)]
                command += ["--workers", str(workers), "--packing", arguments.packing, "--run", way, "--folder", name]
                if way in peers:
                    texts = Path(scratch, f"{way}{workers}")
                    command = _PEERS[way](peers[way], texts, tokenizer, folder, workers)
                measured = _measure(command, folder)
                if way == "build":
                    manifest = read_manifest(folder / "corpus")
                    size = sum(shard.bytes for shard in manifest.shards) / manifest.tokens
                    print(f"output {size:.4f} bytes per token; ", end="")
            found.setdefault((way, workers), []).append(measured)
            seconds = f"{measured['cpu']:8.2f} CPU-seconds, {measured['wall']:8.2f} seconds"
            print(f"round {round_ + 1}: {way:9} workers {workers} {seconds}", flush=True)

    text = sum(source.bytes for source in find_sources(inputs))
    print(f"\n{text:,} bytes of input, {tokens:,} tokens of text")
    print("candidate, workers  min   median      max")
    print("thousand tokens per CPU-second")
    _table({key: [tokens / one["cpu"] / 1e3 for one in runs] for key, runs in found.items()})
    print("thousand tokens per second")
    _table({key: [tokens / one["wall"] / 1e3 for one in runs] for key, runs in found.items()})
    print(
        "ratios per round: build / candidate in tokens per CPU-second; build / build with first --workers in tokens/s"
    )
    for (way, workers), runs in found.items():
        figure, mine = ("cpu", workers) if way != "build" else ("wall", arguments.workers[0])
        others = found.get(("build", mine))
        if others and (way, workers) != ("build", mine):
            sign = 1 if way == "build" else -1
            ratios = sorted((b[figure] / o[figure]) ** sign for b, o in zip(others, runs, strict=True))
            print(f"{way:12} {workers} {ratios[0]:10.2f} {statistics.median(ratios):8.2f} {ratios[-1]:8.2f}")


if __name__ == "__main__":
    main()
