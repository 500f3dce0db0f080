"""The trimmed mean beside SciPy's."""

import re

import pytest
import scipy.stats
import torch
from cases import J3, normal, rows
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules.trimmed_mean import SHORT

FIVE = rows([[1, 0], [1.2, 0.1], [0.9, -0.2], [-5, 4], [0.5, 0.45]])


def trimmed(jacobian: Tensor, n_trimmed: int | None) -> Tensor:
    return aggregate(jacobian, make_rule("trimmed_mean", n_trimmed=n_trimmed)).direction


def test_golden() -> None:
    expected = rows([[0.8, 0.183333]])[0]
    torch.testing.assert_close(trimmed(FIVE, 1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(trimmed(rows(J3), 1), rows([[0, 1, 1, 0]])[0])


@pytest.mark.parametrize("n", [1, SHORT - 1, 4 * SHORT])  # sorted, or compared in pairs
@pytest.mark.parametrize(("m", "b"), [(2, 0), (3, 1), (4, 1), (5, 2), (8, 0), (8, 3), (41, 20)])
def test_same_as_scipy(m: int, b: int, n: int) -> None:
    jacobian = normal(m, n, seed=m) * 10 ** (3 * normal(m, 1, seed=n))
    before = jacobian.clone()
    found = trimmed(jacobian, b)
    expected = torch.from_numpy(scipy.stats.trim_mean(jacobian.numpy(), b / m + 1e-9, axis=0))
    torch.testing.assert_close(found, expected)
    assert torch.equal(jacobian, before)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m))
    torch.testing.assert_close(trimmed(jacobian[order], b), found)
    torch.testing.assert_close(trimmed(-jacobian, b), -found)
    assert (found <= jacobian.amax(dim=0)).all()
    assert (found >= jacobian.amin(dim=0)).all()


@pytest.mark.parametrize("n", [3, 4 * SHORT])
def test_outliers_have_no_part(n: int) -> None:
    honest = normal(5, n, seed=1)
    liars = torch.tensor([[1e100], [-1e100]], dtype=torch.float64).expand(2, n)
    torch.testing.assert_close(trimmed(torch.cat((liars, honest)), 1), honest.mean(dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [7, 4 * SHORT])
def test_low_precision_is_summed_in_a_higher_one(n: int, dtype: torch.dtype) -> None:
    jacobian = (100 + normal(40, n, seed=3)).to(dtype)
    found = trimmed(jacobian, 2)
    assert found.dtype == dtype
    expected = trimmed(jacobian.double(), 2)
    assert ((found - expected) / expected).abs().max() <= torch.finfo(dtype).eps


def test_one_of_each_as_soon_as_there_are_three_tasks() -> None:
    for m, b in ((1, 0), (2, 0), (3, 1), (9, 1)):
        jacobian = normal(m, 5, seed=m)
        torch.testing.assert_close(trimmed(jacobian, None), trimmed(jacobian, b))


def test_parameters_of_every_shape_and_no_alias() -> None:
    scalar, big = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(20, 30))
    base = torch.optim.SGD([scalar, big], lr=1.0)
    mtl_opt = MTLOptimizer(base, make_rule("trimmed_mean"), scale="native")
    targets = [-1.0, 0.5, 4.0, 1.0]
    for _ in range(2):
        mtl_opt.zero_grad()
        mtl_opt.backward([(scalar * big.sum()) * target for target in targets])
        assert scalar.grad is not None
        assert big.grad is not None
        torch.testing.assert_close(scalar.grad, torch.tensor(600 * 0.75))
        torch.testing.assert_close(big.grad, torch.full((20, 30), 0.75))


def test_too_few_tasks() -> None:
    sentence = (
        "TrimmedMean: `n_trimmed` must be less than half the number of tasks, got 2 with 4 tasks."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        trimmed(normal(4, 3), 2)
