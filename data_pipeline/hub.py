"""Models and tokenizers by their name on a Hugging Face hub: NAME, OWNER/NAME or either with @REVISION → local folder.

Only configuration, tokenizer and safetensors files are fetched: no code, and nothing that would be unpickled. The
library is huggingface_hub, with its cache (HF_HOME), its endpoint (HF_ENDPOINT) and its tokens (`hf auth login`). The
folder is the snapshot of one commit: .../models--OWNER--NAME/snapshots/COMMIT. A folder of that name takes precedence.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from data_pipeline.files import CorpusError

# What a fast tokenizer's folder consists of, besides SentencePiece models.
FAST_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
TOKENIZER_FILES = ("config.json", *FAST_TOKENIZER_FILES, "*.model")
MODEL_FILES = (*TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?")

# Folders that a message lists.
_SHOWN = 8

_logger = logging.getLogger(__name__)


class HubError(CorpusError):
    """A name that cannot be resolved: message with name, reason and remedy."""


def parse_name(text: str | Path) -> tuple[str, str | None] | None:
    """(name, revision) of what may be a name on a hub; None for what is a path: an existing file or folder, or a text
    that is absolute, ends with a slash, or has more than one."""
    found = _NAME.fullmatch(str(text))
    if found is None or Path(text).exists():
        return None
    return found["name"], found["revision"]


def snapshot_name(folder: str | Path) -> tuple[str, str] | None:
    """(name, commit) of a folder in the hub's cache; None for other folders."""
    found = _SNAPSHOT.search(Path(folder).as_posix())
    return (found["name"].replace("--", "/"), found["commit"]) if found else None


def local_folder(text: str | Path, files: tuple[str, ...], what: str, log: logging.Logger | None = None) -> Path:
    """The folder that `text` names; if there is none, the model of this name is fetched, unless it is in the cache.

    files: patterns of what to fetch. what: for messages, such as "--tokenizer". log: of the calling package; None: of
    this one. Call in one process.
    Raises HubError if `text` is neither a folder nor a model on the hub, or if the hub cannot be reached.
    """
    log = log or _logger
    if (parsed := parse_name(text)) is None:
        _say_that_it_is_a_folder(text, what, log)
        return Path(text)
    name, revision = parsed
    try:
        import huggingface_hub
    except ImportError:
        raise HubError(
            f"{what} {text}: no such folder; to fetch a model of this name, install the package huggingface_hub"
        ) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of the library, of its HTTP client and of the file system
        raise HubError(f"{what} {text}: {_why(error, name, revision, files)}") from None
    log.info("%s %s: commit %s, %s", what, text, folder.name, folder)
    return folder


def _say_that_it_is_a_folder(text: str | Path, what: str, log: logging.Logger) -> None:
    """Log that a folder is used although a model of this name was fetched earlier; the name alone is ambiguous."""
    found = _NAME.fullmatch(str(text))
    if found is None or not Path(text).is_dir():
        return
    level, note = logging.INFO, ""
    try:
        from huggingface_hub import constants

        if (Path(constants.HF_HUB_CACHE) / f"models--{found['name'].replace('/', '--')}").is_dir():
            level, note = logging.WARNING, f", not the model on the hub; for that, use {found['name']}@main"
    except ImportError:
        pass
    log.log(level, "%s %s: the folder of this name is used%s", what, text, note)


def _why_no_folder(name: str) -> str | None:
    """Of a name that is probably a mistyped path, as its first part is a folder here: what that folder has."""
    parent = Path(name).parent
    if parent == Path() or not parent.is_dir():
        return None
    there = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    shown = ", ".join(there[:_SHOWN]) + (", …" if len(there) > _SHOWN else "")
    return (
        f"no such folder; {parent} has {shown or 'none'}. Correct the path, or rename "
        f"{parent} if this is a model on the hub, which could not be fetched"
    )


def _why(error: Exception, name: str, revision: str | None, files: tuple[str, ...]) -> str:
    """Reason and remedy, as the end of a message."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted. Accept its conditions at {endpoint}/{name}, then run: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision}. Use a branch, a tag or a commit that {endpoint}/{name} has"
    if (mistyped := _why_no_folder(name)) is not None:
        return mistyped
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"neither a folder here nor a model at {endpoint}. Correct the name or path; if the model is private, run: "
            "hf auth login"
        )
    reason = str(error.__cause__ or error).splitlines()[0] if str(error) else type(error).__name__
    fetch = f"hf download {name}{f' --revision {revision}' if revision else ''} --include {' '.join(map(repr, files))}"
    offline = "offline mode is set (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else f"{endpoint}: {reason}"
    return (
        f"no such folder, and the model of this name is not in the cache {constants.HF_HUB_CACHE} and cannot be "
        f"fetched ({offline}). Run on a machine with access, with HF_HOME on a shared file system, or with --local-dir "
        f"and copy that folder: {fetch}"
    )
