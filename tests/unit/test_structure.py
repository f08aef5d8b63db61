"""The layers of the design, read from the syntax trees; and what must not be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = [
    {"__init__", "config_file", "echo", "estimators", "hashing", "outcome", "slurm", "terminal", "variants"},
    {
        "conditional_poisson",
        "config_data",
        "config_masking",
        "config_model",
        "config_phases",
        "config_survival",
        "fence",
        "mixture",
        "node_files",
        "pareto",
        "random_effects",
        "vocabulary",
    },
    {"config", "batch", "manifest"},
    {"launch", "monitors", "strategies", "strategy_spec", "variance_report"},
    {"distributed", "masking", "schedule", "model"},
    {
        "initial_weights",
        "partitions",
        "layerwise",
        "lamb",
        "loader",
        "metrics",
        "mapnet",
        "gradient_norm",
        "mask_covariance",
    },
    {"background", "divergence", "elastic", "engine", "proposer", "signals", "sketch", "watchdog"},
    {"checkpoint", "step"},
    {"evaluate", "phases", "oracles", "moments"},
    {"auto", "restore", "run"},
    {"parts"},
    {"saving"},
    {
        "benchmark",
        "benchmark_corpus",
        "benchmark_lamb",
        "benchmark_masks",
        "checkpoint_cli",
        "compare",
        "demo",
        "export",
        "interconnect",
        "train",
        "variance",
    },
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
# Within a level a module may import those that are listed for it.
SIDEWAYS = {
    ("config_phases", "config_masking"),
    ("distributed", "config"),
    ("benchmark", "train"),
    ("benchmark", "benchmark_corpus"),
    ("benchmark", "benchmark_lamb"),
    ("benchmark", "benchmark_masks"),
    ("benchmark_masks", "benchmark_corpus"),
    ("variance", "export"),
    ("lamb", "layerwise"),
    ("lamb", "partitions"),
    ("layerwise", "partitions"),
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("path", modules("maskvr_ds"), ids=lambda p: p.stem)
def test_imports_point_down(path: Path) -> None:
    assert path.stem in LEVEL, f"give {path.stem} a level"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "maskvr_ds" and len(parts) > 1 and parts[1] in LEVEL:
            lower = LEVEL[parts[1]] < LEVEL[path.stem]
            assert lower or (path.stem, parts[1]) in SIDEWAYS, f"{path.stem} imports {parts[1]}"
        if parts[0] == "data_pipeline":
            assert parts[1:2] in ([], ["shards"]), f"{path.stem} imports {name}"
        assert parts[0] != "cluster"


@pytest.mark.parametrize(
    "path", modules("data_pipeline") + modules("cluster"), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_light_packages_import_nothing_heavy(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    if path.stem == "benchmark":
        roots -= {"transformers"}  # one of the peers that it measures
    assert not roots & {"torch", "deepspeed", "transformers"}
    own = {".".join(name.split(".")[:2]) for name in imports(path) if name.startswith("maskvr_ds")}
    light = {"maskvr_ds"} | {
        f"maskvr_ds.{name}" for name in ("config", "echo", "fence", "outcome", "slurm", "terminal")
    }
    assert own <= (light if path.parent.name == "cluster" else set())


def test_only_engine_initialises_deepspeed() -> None:
    callers = set()
    for path in modules("maskvr_ds"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "deepspeed.initialize":
                callers.add(path.stem)
    assert callers == {"engine"}


@pytest.mark.parametrize(
    "module", ["maskvr_ds", "maskvr_ds.config", "maskvr_ds.cli", "data_pipeline", "data_pipeline.build", "cluster"]
)
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("maskvr_ds", "data_pipeline", "cluster", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
