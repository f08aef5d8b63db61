"""Job scripts of every kind, as `python -m cluster slurm` writes them."""

from pathlib import Path

from cluster.__main__ import main

# Name → options. Hostile ones are data.
VARIANTS: dict[str, list[str]] = {
    "cpu": ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1"],
    "cpu range": ["--nodes", "1-2", "--gpus-per-node", "0", "--tasks-per-node", "1"],
    "gpu": ["--nodes", "1", "--gpus-per-node", "1", "--time", "1:00:00", "--partition", "low"],
    "gpu range": ["--nodes", "1-2", "--gpus-per-node", "1", "--mem", "1000M", "--signal-seconds", "60"],
    "seeds": ["--nodes", "1", "--gpus-per-node", "1", "--seeds", "0", "7", "8"],
    "surroundings": [
        *("--nodes", "1", "--gpus-per-node", "1", "--module", "cuda/12", "my module", "--venv", "my venv"),
        *("--job-name", 'it\'s "a" $(name) #1', "--sbatch", "comment=two words", "--sbatch", "nice=5"),
    ],
    "container": ["--nodes", "1", "--gpus-per-node", "1", "--container", "an image.sif"],
    "data": [
        *("--nodes", "1", "--gpus-per-node", "1", "--build-cpus", "1", "--build-time", "30"),
        *("--build-data", "--input 'my texts' --output corpus --workers 1"),
    ],
}


def job_scripts(folder: Path) -> dict[str, list[Path]]:
    """Name → its scripts, data.sbatch before job.sbatch. The run's folders have blanks, quotes and `$(…)` in them."""
    scripts = {}
    for name, options in VARIANTS.items():
        run = folder / f"a {name}'s run $(touch injected)"
        run_options = ["--config", "demo_cpu", "--set", "data.path=a corpus", "--set", f'output_dir="{run}"']
        assert main(["slurm", *run_options, *options]) == 0
        scripts[name] = sorted((run / "slurm").glob("*.sbatch"))
    return scripts
