"""Import rules of the packages, read from the syntax trees; lengths of files and functions."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A row imports only from rows below it, and from its own package.
ROWS = {
    "maskvr_ds": [
        {"cli"},
        {"benchmarks"},
        {"downstream", "integrations", "train"},
        {"training"},
        {"analysis", "demo", "planning"},
        {"checkpoint"},
        {"engine"},
        {"masking", "models", "reliability"},
        {"data", "telemetry"},
        {"config", "lamb"},
        {"run_folder"},
        {"hashing", "optim", "runtime", "recipes"},
    ],
    "data_pipeline": [
        {"__main__", "benchmark"},
        {"build", "options"},
        {"arguments"},
        {"reports"},
        {"packing"},
        {"tokenization"},
        {"outputs"},
        {"sources"},
        {"execution", "filters", "shards"},
        {"shard_files"},
        {"hub", "manifest"},
        {"checksums"},
        {"console", "files", "numbers", "yaml_values"},
    ],
    "cluster": [{"__main__"}, {"hosts", "slurm", "status"}, {"phases"}],
}
PACKAGES = tuple(ROWS)
# Modules that run without torch installed.
TORCH_FREE = {
    "maskvr_ds": (
        "cli",
        "config",
        "data.vocabulary",
        "run_folder",
        "runtime.files",
        "runtime.heartbeats",
        "runtime.hostfile",
        "runtime.logs",
        "runtime.numbers",
        "runtime.processes",
        "runtime.slurm_env",
        "runtime.terminal",
        "optim.variants",
        "reliability.launch",
        "reliability.signals",
        "telemetry.metrics_file",
        "masking.checks",
        "masking.rates",
        "planning",
        "models.initial_folder",
        "models.new_vocabulary",
        "downstream.tasks",
        "training.length",
        "training.references",
        "analysis.gradient_variance.options",
        *(f"analysis.health.{name}" for name in ("checks", "picture", "records", "report", "series")),
    ),
    "data_pipeline": ("",),
    "cluster": ("",),
}
HEAVY = {"torch", "deepspeed", "transformers"}
# The Slurm commands check corpora, and find tokenizers by name, before a job is queued.
PIPELINE_OF_SLURM = {"build", "files", "hub", "manifest", "outputs", "packing", "sources", "tokenization", "__main__"}


def files(package: str) -> dict[str, Path]:
    """Dotted module name → file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in files(package).items()}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it, also under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_modules(names: set[str]) -> set[str]:
    """The names that belong to the project, as modules."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names if name.split(".")[0] in PACKAGES}


def room(module: str) -> tuple[str, str]:
    """Package and first folder, or file, below it: ("maskvr_ds", "masking")."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    package, here = room(module)
    if not here:
        assert not own_modules(imports(MODULES[module])), "a package's own __init__ imports nothing of the project"
        return
    row = {name: number for number, row in enumerate(ROWS[package]) for name in row}
    assert here in row, f"give {package}/{here} a row"
    for other in own_modules(imports(MODULES[module])):
        other_package, there = room(other)
        if other_package == package and there and there != here:
            assert row[there] > row[here], f"{module} imports {other}"


def test_no_import_cycles() -> None:
    graph = {name: own_modules(imports(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_folder_is_a_package() -> None:
    for name, path in MODULES.items():
        assert (path.parent / "__init__.py").is_file(), name


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("maskvr_ds.")])
def test_training_needs_little_of_the_other_packages(module: str) -> None:
    others = {other for other in own_modules(imports(MODULES[module])) if not other.startswith("maskvr_ds")}
    assert others <= {
        f"data_pipeline.{name}" for name in ("shards", "manifest", "files", "hub", "console", "yaml_values")
    }


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("maskvr_ds")])
def test_pipeline_and_cluster_need_little_of_the_training(module: str) -> None:
    others = own_modules(imports(MODULES[module]))
    training = {other.removeprefix("maskvr_ds.") for other in others if other.startswith("maskvr_ds")}
    if module.startswith("data_pipeline"):
        assert not training
        assert not any(other.startswith("cluster") for other in others)
    free = TORCH_FREE["maskvr_ds"]
    assert all(any(other == f or other.startswith(f"{f}.") for f in free) for other in training), training
    if module.startswith("cluster"):
        pipeline = {room(other)[1] for other in others if other.startswith("data_pipeline")}
        assert pipeline <= (PIPELINE_OF_SLURM if module.startswith("cluster.slurm") else {"console", "yaml_values"})


@pytest.mark.parametrize(
    "module", [n for n in MODULES if any(n == p or n.startswith(f"{p}.") for p in ("data_pipeline", "cluster"))]
)
def test_light_packages_import_nothing_heavy(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    if module == "data_pipeline.benchmark":
        roots -= {"transformers"}  # one of the peers that it measures
    assert not roots & HEAVY


def test_importing_loads_no_torch() -> None:
    """Every torch-free module, in one process: what one of them loads, all have loaded."""
    names = [
        name
        for name in MODULES
        for package, _, rest in [name.partition(".")]
        if any(not free or rest == free or rest.startswith(f"{free}.") for free in TORCH_FREE[package])
        if not name.endswith("__main__") or name == "maskvr_ds.cli.__main__"
    ]
    assert {"maskvr_ds.cli.main", "maskvr_ds.config.run", "data_pipeline.build", "cluster.hosts.launch"} <= set(names)
    code = f"import sys, {', '.join(names)}; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_only_engine_initialises_deepspeed() -> None:
    callers = set()
    for name, path in files("maskvr_ds").items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "deepspeed.initialize":
                callers.add(name)
    assert callers == {"maskvr_ds.engine.engine"}


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in (*PACKAGES, "tests", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_functions_stay_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > 80
        # A table of options: one statement each.
        if not node.name.endswith("_options")
    }
    assert not long
