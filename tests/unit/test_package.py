"""The installed wheel finds its recipes, DeepSpeed configurations and templates."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_is_complete(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    for folder in ("maskvr_ds", "data_pipeline", "cluster", "ds_configs"):
        here = {
            p.relative_to(ROOT).as_posix()
            for p in (ROOT / folder).rglob("*")
            if p.suffix in (".py", ".json", ".yaml", ".sbatch")
        }
        assert here <= names
    assert not any(name.startswith("tests/") for name in names)
    code = (
        "import collections, sys; sys.path.insert(0, sys.argv[1]);"
        "import maskvr_ds.config as c, data_pipeline, cluster;"
        "assert c.__file__.startswith(sys.argv[1]), c.__file__;"
        "configs = [c.load_config(r) for r in c.recipes()]; assert len(configs) >= 3;"
        "[c.deepspeed_config_path(x.deepspeed).read_text() for x in configs]"
    )
    code += "; from maskvr_ds.cli import main; assert main(['recipes', 'demo_cpu']) == 0"
    code += "; from cluster.slurm.script import render; values = collections.defaultdict(str)"
    code += "; assert '<<' not in render('continued.sbatch', values); assert values"
    # -I: neither the checkout nor PYTHONPATH.
    subprocess.run([sys.executable, "-I", "-c", code, str(site)], check=True, cwd=tmp_path)
