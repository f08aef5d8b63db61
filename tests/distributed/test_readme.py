"""The script in docs/how-to/use-lamb-alone.md runs as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_optimizer_alone(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "use-lamb-alone.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    script = tmp_path / "bert.py"
    script.write_text(block[1], encoding="utf-8")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", str(script)]
    run = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    printed = re.findall(r"\{'bert.embeddings.word_embeddings.weight': ([\d.e-]+)", run.stdout)
    assert len(printed) == 2
    assert printed[0] == printed[1], "the same ratio on both ranks"

    script.write_text(block[1].replace("\nbind(engine)", "\n# bind(engine)"), encoding="utf-8")
    run = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert "maskvr_ds.lamb.bind(engine) once" in run.stderr
    assert run.returncode != 0
