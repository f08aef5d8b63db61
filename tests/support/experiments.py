"""Scripts of docs/experiments as modules."""

import importlib.util
from types import ModuleType

from tests.support.documents import ROOT


def load_experiment(name: str) -> ModuleType:
    """docs/experiments/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/experiments/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
