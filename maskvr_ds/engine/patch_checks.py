"""Checks of the parts of DeepSpeed that this package replaces or uses although they are internal."""

import importlib
import inspect
from typing import Any

import deepspeed
import torch

# The version of DeepSpeed that all patches were checked against.
CHECKED = "0.19.8"


def part(patch: str, module: str, name: str) -> Any:
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise mismatch(patch, str(error)) from None
    check_part(patch, owner, name)
    return getattr(owner, name)


def check_part(patch: str, owner: Any, name: str, *parameters: str) -> None:
    """Raise RuntimeError if `owner` has no attribute `name`, or if its parameters have other names ("*": any name).

    Without `parameters` its signature is not checked.
    """
    label = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not hasattr(owner, name):
        raise mismatch(patch, f"{label} does not exist")
    if not parameters:
        return
    found = list(inspect.signature(getattr(owner, name)).parameters)
    if len(found) != len(parameters) or any(p not in ("*", f) for p, f in zip(parameters, found, strict=True)):
        raise mismatch(patch, f"{label} takes ({', '.join(found)}), expected ({', '.join(parameters)})")


def mismatch(patch: str, fault: str) -> RuntimeError:
    return RuntimeError(
        f"maskvr_ds/engine: {patch}: {fault}. Found DeepSpeed {deepspeed.__version__} (torch {torch.__version__}), "
        f"checked against {CHECKED}; install deepspeed=={CHECKED}, or adapt the patch"
    )
