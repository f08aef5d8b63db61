"""Tokens per CPU-second of `build` against the bare tokenizer and against `datasets`.

    python -m data_pipeline.benchmark --input texts/ --tokenizer tok/

Three ways to the same text, alternating, each in a fresh process that may use one thread:

    build       the whole command: interpreter, reading, hashing, tokenising, packing, writing
    encode      `tokenizers` encode_batch_fast alone: only the calls, the documents being in memory
    datasets    as in transformers' run_mlm.py: map(tokenizer), map(group_texts), save_to_disk; whole process

CPU seconds are user + system. A token is a token of the text, without special tokens: the same number for
all three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.documents import batches, read_documents
from data_pipeline.shards import read_manifest
from data_pipeline.sources import Piece, find_sources
from data_pipeline.tokenizer import Encoder, copy_tokenizer

WAYS = ("build", "encode", "datasets")


def _documents(inputs: Sequence[str]) -> Iterator[tuple[str, bool]]:
    for source in find_sources(inputs):
        piece = Piece(0, 0, source.bytes)
        yield from read_documents(source, piece, "blank-line", "text", lambda *_: None)


def _build(inputs: Sequence[str], tokenizer: str, length: int, folder: Path) -> dict[str, Any]:
    from data_pipeline.build import build

    build(inputs, tokenizer, length, folder / "corpus", progress=False)
    return {}


def _encode(inputs: Sequence[str], tokenizer: str, length: int, folder: Path) -> dict[str, Any]:
    encoder = Encoder(tokenizer)
    texts = [batch for batch, _ in batches(_documents(inputs), 1 << 20)]
    begin = time.process_time()
    tokens = sum(sum(map(len, encoder.tokenizer.encode_batch_fast(b, add_special_tokens=False))) for b in texts)
    return {"cpu": time.process_time() - begin, "tokens": tokens}


def _datasets(inputs: Sequence[str], tokenizer: str, length: int, folder: Path) -> dict[str, Any]:
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
    tokenized = raw.map(tokenize, batched=True, remove_columns=["text"])
    tokenized.map(group_texts, batched=True).save_to_disk(str(folder / "saved"))
    return {}


def _measure(way: str, inputs: Sequence[str], tokenizer: str, length: int, folder: Path) -> dict[str, Any]:
    """Run one way in a fresh process; returns its CPU seconds (user + system) and what it reported."""
    one_thread = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
    }
    command = [sys.executable, "-m", "data_pipeline.benchmark", "--input", *inputs, "--tokenizer", tokenizer]
    command += ["--sequence-length", str(length), "--run", way, "--folder", str(folder)]
    process = subprocess.Popen(command, env=os.environ | one_thread, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{way} failed with exit code {process.returncode}")
    return {"cpu": usage.ru_utime + usage.ru_stime, **json.loads(output.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--input", nargs="+", required=True, help="text files, documents separated by blank lines")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    inputs, length = arguments.input, arguments.sequence_length
    if arguments.run:
        run = {"build": _build, "encode": _encode, "datasets": _datasets}[arguments.run]
        print(json.dumps(run(inputs, arguments.tokenizer, length, arguments.folder)))
        return

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer")
        copy_tokenizer(arguments.tokenizer, tokenizer)
        for round_ in range(arguments.rounds):
            for way in WAYS:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    found = _measure(way, inputs, str(tokenizer), length, Path(folder))
                    seconds[way].append(found["cpu"])
                    if way == "encode":
                        tokens = found["tokens"]
                    if way == "build":
                        manifest = read_manifest(Path(folder, "corpus"))
                        size = sum(shard.bytes for shard in manifest.shards) / manifest.tokens
                print(f"round {round_ + 1}: {way:9} {found['cpu']:8.2f} CPU-seconds", flush=True)

    text = sum(source.bytes for source in find_sources(inputs))
    print(f"\n{text:,} bytes of input, {tokens:,} tokens of text, output {size:.4f} bytes a token")
    print("thousand tokens a CPU-second      min   median      max")
    rates = {way: sorted(tokens / cpu / 1e3 for cpu in seconds[way]) for way in WAYS}
    for way, rate in rates.items():
        print(f"{way:28} {rate[0]:8.0f} {statistics.median(rate):8.0f} {rate[-1]:8.0f}")
    for way in WAYS[1:]:
        ratios = sorted(cpu / mine for mine, cpu in zip(seconds["build"], seconds[way], strict=True))
        print(f"build / {way:20} {ratios[0]:8.2f} {statistics.median(ratios):8.2f} {ratios[-1]:8.2f}")


if __name__ == "__main__":
    main()
