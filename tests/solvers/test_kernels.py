"""The Triton kernels, run by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

SCRIPT = """
import contextlib
import torch

torch.cuda.device = lambda device: contextlib.nullcontext()
from gradbal.solvers import kernels

generator = torch.Generator().manual_seed(0)
assert kernels.agree(torch.device("cpu"))
for m, n in [(1, 5), (2, 300), (5, 129), (8, 257), (9, 300), (40, 130)]:
    for dtype, error in {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-2}.items():
        rows = torch.randn(m, n + 3, generator=generator).to(dtype)[:, :n]
        weights = torch.rand(m, generator=generator, dtype=torch.float64)
        wide, found = rows.double(), torch.empty(n, dtype=dtype)
        torch.testing.assert_close(kernels.gram(rows), wide @ wide.T, rtol=0, atol=1e-11)
        kernels.combine(rows, weights, found)
        torch.testing.assert_close(found.double(), weights @ wide, rtol=error, atol=m * error)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_agree_with_plain_operations() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=env, check=True, timeout=120)
