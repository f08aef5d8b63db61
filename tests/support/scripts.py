"""Job scripts of all kinds, as `python -m cluster slurm` writes them."""

import shlex
from pathlib import Path

from cluster.__main__ import main
from tests.support.corpora import make_corpus

# Name → options; some values are hostile to a shell. BUILD is replaced by `build_words`, VENV by an environment with a
# blank in its path.
VARIANTS: dict[str, list[str]] = {
    "cpu": ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1"],
    "cpu range": ["--nodes", "1-2", "--gpus-per-node", "0", "--tasks-per-node", "1"],
    "gpu": ["--nodes", "1", "--gpus-per-node", "1", "--time", "1:00:00", "--partition", "low"],
    "gpu range": ["--nodes", "1-2", "--gpus-per-node", "1", "--mem", "1000M", "--signal-seconds", "60"],
    "seeds": ["--nodes", "1", "--gpus-per-node", "1", "--seeds", "0", "7", "8"],
    "surroundings": [
        *("--nodes", "1", "--gpus-per-node", "1", "--module", "cuda/12", "my module", "--venv", "VENV"),
        *("--job-name", 'it\'s "a" $(name) #1', "--sbatch", "comment=two words", "--sbatch", "nice=5"),
    ],
    "container": ["--nodes", "1", "--gpus-per-node", "1", "--container", "an image.sif"],
    "data": [
        *("--nodes", "1", "--gpus-per-node", "1", "--build-cpus", "1", "--build-time", "30"),
        *("--build-data", "BUILD"),
    ],
    "data in a container": [
        *("--nodes", "1", "--gpus-per-node", "1", "--container", "i.sif"),
        *("--build-cpus", "1", "--build-data", "BUILD"),
    ],
}


def build_words(folder: Path, corpus: Path) -> list[str]:
    """Options of a build in `folder`: writes its texts, takes the tokenizer of an existing corpus."""
    texts = folder / "my texts"
    texts.mkdir(parents=True, exist_ok=True)
    (texts / "a.txt").write_text("w1 w2 w3\n")
    words = ["--input", str(texts), "--tokenizer", str(corpus / "tokenizer"), "--sequence-length", "32"]
    return [*words, "--output", str(folder / "built")]


def job_scripts(folder: Path) -> dict[str, list[Path]]:
    """Name → its scripts, data.sbatch before job.sbatch. Paths of the runs contain blanks, quotes and `$(…)`."""
    corpus = make_corpus(folder / "a corpus", rows=10, words=10)
    build = shlex.join(build_words(folder, corpus))
    venv = folder / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    scripts = {}
    for name, options in VARIANTS.items():
        run = folder / f"a {name}'s run $(touch injected)"
        data = folder / "built" if "BUILD" in options else corpus
        sets = [f'data.path="{data}"', "evaluation.every_steps=0", f'output_dir="{run}"']
        words = [word for text in sets for word in ("--set", text)]
        options = [{"BUILD": build, "VENV": str(venv)}.get(word, word) for word in options]
        assert main(["slurm", "--config", "demo_cpu", *words, *options]) == 0
        scripts[name] = sorted((run / "slurm").glob("*.sbatch"))
    return scripts
