"""Speed of rows of documents: padded, packed with attention over rows, packed with attention within documents.

Builds two corpora of the same text, one document per row (packing documents) and full rows (packing full_sequences),
and takes forward and backward passes of the same model over each, alternating, on one thread. A unit of work is a
micro-batch; what is compared is real tokens (no padding) per CPU-second.

    python docs/experiments/documents_speed.py --input fortunes.txt.gz --documents blank-line --output result.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.config import ModelConfig
from maskvr_ds.data.documents import document_lengths
from maskvr_ds.data.loader import Loader
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.losses import weighted_loss
from maskvr_ds.training.setup import encoder_config

LENGTH, ROWS = 128, 16


class Way:
    """A corpus with its model: `step` takes one micro-batch."""

    def __init__(self, corpus: Path, attention: str, preset: str) -> None:
        self.corpus = Corpus(corpus)
        sep = self.corpus.manifest.special_tokens.sep
        settings = {"preset": preset, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        config = encoder_config(ModelConfig.model_validate(settings), self.corpus, None)
        torch.manual_seed(0)
        self.module = MaskedLanguageModel(config, separator=sep if attention == "documents" else None)
        self.masker = Masker.for_corpus(self.corpus.manifest, seed=0)
        self.batches = Loader(self.corpus, seed=0, global_size=ROWS).batches()
        documents = document_lengths(self.corpus) if attention == "documents" else None
        most = self.masker.maximum_predictions
        self.flops = flops_per_sequence(config, LENGTH, most, batch=ROWS, documents=documents)

    def step(self) -> int:
        """One forward and backward pass; returns the number of tokens that are no padding."""
        batch = next(self.batches)
        weighted_loss(self.module, self.masker(batch)).backward()
        self.module.zero_grad()
        return batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())


def build(source: list[str], unit: str, folder: Path) -> None:
    """The tokenizer and the two corpora, unless they exist."""
    pipeline = [sys.executable, "-m", "data_pipeline"]
    if not (folder / "tok").exists():
        command = [*pipeline, "tokenizer", "--input", *source, "--vocab-size", "8192", "--output", str(folder / "tok")]
        subprocess.run([*command, "--documents", unit], check=True)
    for packing in ("documents", "full_sequences"):
        options = ["--tokenizer", str(folder / "tok"), "--sequence-length", str(LENGTH), "--documents", unit]
        output = str(folder / packing)
        subprocess.run(
            [*pipeline, "build", "--input", *source, *options, "--packing", packing, "--output", output], check=True
        )


def measure(folder: Path, preset: str, rounds: int) -> dict[str, Any]:
    """Real tokens per CPU-second of each way, and their ratios, by round."""
    ways = {
        "padded": Way(folder / "documents", "rows", preset),
        "packed_rows": Way(folder / "full_sequences", "rows", preset),
        "packed_documents": Way(folder / "full_sequences", "documents", preset),
    }
    for way in ways.values():
        way.step()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            tokens = sum(way.step() for _ in range(4))
            rates[name].append(tokens / (time.process_time() - start))
    lengths, rows = document_lengths(ways["packed_documents"].corpus)
    padded = ways["padded"].corpus.manifest
    ratios = {
        f"packed_documents ÷ {other}": [a / b for a, b in zip(rates["packed_documents"], rates[other], strict=True)]
        for other in ("padded", "packed_rows")
    }
    return {
        "model": preset,
        "sequence_length": LENGTH,
        "rows_per_batch": ROWS,
        "documents_per_packed_row": len(lengths) / rows,
        "mean_document_tokens": float(np.mean(lengths)),
        "share_of_padding_in_padded_rows": 1 - padded.tokens / (padded.rows * LENGTH),
        "gflops_per_sequence": {name: way.flops / 1e9 for name, way in ways.items()},
        "real_tokens_per_cpu_second": {name: _spread(found) for name, found in rates.items()},
        "ratio_per_round": {name: _spread(found) for name, found in ratios.items()},
        "load_average": os.getloadavg()[0],
        "versions": f"torch {torch.__version__}",
    }


def _spread(values: list[float]) -> list[float]:
    """Minimum, median, maximum."""
    return [round(x, 3) for x in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text with short documents")
    parser.add_argument("--documents", default="blank-line", help="unit of a document (default: blank-line)")
    parser.add_argument("--folder", default="documents_speed", help="for the corpora (default: documents_speed)")
    parser.add_argument("--preset", default="bert-mini", help="model (default: bert-mini)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", required=True, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    build(arguments.input, arguments.documents, Path(arguments.folder))
    result = measure(Path(arguments.folder), arguments.preset, arguments.rounds)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    Path(arguments.output).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
