"""The examples start with the line that their page shows, learn, and leave nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"epoch +1: left ([\d.]+) .* right ([\d.]+) .* larger ([\d.]+) \(weight [\d.]+\)")
EXAMPLES = ["ddp", "fsdp2", "tensor_parallel"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str) -> None:
    script = f"docs/examples/{name}.py"
    command = f"torchrun --nproc-per-node 2 {script}"
    assert command in (ROOT / "docs/integrations/torchrun.md").read_text("utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, "1"]
    places = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        start, cwd=ROOT, env=os.environ | places, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "destroy_process_group" not in done.stderr
    found = LINE.search(done.stdout)
    assert found is not None, done.stdout
    left, right, larger = map(float, found.groups())
    assert min(left, right) > 0.13  # 0.1 by chance
    assert larger > 0.53
