"""ONNX files of `arch_zoo`'s models take any number of examples and compute the same."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "arch_zoo"))  # the cases of its own tests

from zoo_cases import CASES, Kit, build

onnx = pytest.importorskip("onnx", reason="reads the files")
pytest.importorskip("onnxscript", reason="writes the files")

pytestmark = pytest.mark.filterwarnings("ignore")  # those packages warn of much


@pytest.mark.parametrize("case", [case for case in CASES if case.isidentifier()])
def test_files_compute_the_same(case: str) -> None:
    from onnx.reference import ReferenceEvaluator

    model, x, other = build(case, "vector").eval(), Kit("vector").x(), Kit("vector").x(7, seed=1)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    evaluator = ReferenceEvaluator(program.model_proto)
    found = evaluator.run(None, {evaluator.input_names[0]: other.numpy()})
    for ours, theirs in zip(model(other).values(), found, strict=True):
        torch.testing.assert_close(torch.as_tensor(theirs), ours, rtol=1e-4, atol=1e-5)
