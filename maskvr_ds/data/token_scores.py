"""Tables of token scores for masking strategy `frequency`: a JSON file with one positive number per token id.

    {"tokenizer_sha256": "…", "origin": {…}, "scores": [0.3, 1.7, …]}

tokenizer_sha256: of tokenizer.json, as in a corpus' manifest; origin: how the scores were made, for people. Loads no
torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import Manifest
from maskvr_ds.config import ConfigError
from maskvr_ds.runtime.files import atomic_write, read_json

_SETTING = "masking.frequency.scores"


def write_token_scores(
    path: Path, scores: NDArray[np.float64], tokenizer_sha256: str, origin: Mapping[str, Any]
) -> None:
    """Write float64 [V], positive and finite, atomically."""
    assert scores.ndim == 1
    assert np.all((scores > 0) & np.isfinite(scores))
    content = {"tokenizer_sha256": tokenizer_sha256, "origin": dict(origin), "scores": scores.tolist()}
    atomic_write(path, json.dumps(content, allow_nan=False) + "\n")


def read_token_scores(path: Path, manifest: Manifest) -> NDArray[np.float64]:
    """The scores for the tokens of a corpus: float64 [V]. Raises ConfigError if the file has none, or is of another
    tokenizer."""
    try:
        content = read_json(path)
        scores = np.asarray(content["scores"], np.float64)
        tokenizer = content["tokenizer_sha256"]
    except OSError as error:
        raise ConfigError(f"{_SETTING} {path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{_SETTING} {path}: is no table of token scores; `maskvr token-scores` writes one") from None
    if tokenizer != manifest.tokenizer_sha256:
        raise ConfigError(
            f"{_SETTING} {path}: is for the tokenizer {str(tokenizer)[:12]}, the corpus has "
            f"{manifest.tokenizer_sha256[:12]}; make it with the corpus' tokenizer"
        )
    if scores.shape != (manifest.vocab_size,) or not (np.isfinite(scores).all() and (scores > 0).all()):
        raise ConfigError(
            f"{_SETTING} {path}: expected {manifest.vocab_size:,} positive numbers, one per token of the corpus' "
            "vocabulary"
        )
    return scores
