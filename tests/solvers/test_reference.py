"""The CVXPY versions keep the same conventions, so that a rule can exchange one for the other."""

import sys

import pytest
import torch
from cases import conflicting
from solver_cases import EDGES, draw, rows
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.solvers import (
    cagrad_point,
    cvxpy_cagrad,
    cvxpy_min_norm,
    cvxpy_nash,
    cvxpy_nonnegative_qp,
    equilibrate,
    min_norm,
    nash_point,
    nonnegative_qp,
)


def same(found: Tensor, judge: Tensor, size: float) -> None:
    torch.testing.assert_close(found, judge, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("name", EDGES)
def test_same_conventions(name: str) -> None:
    jac = rows(EDGES[name])
    gram = jac @ jac.T
    cosines, _ = equilibrate(gram)
    size = max(jac.norm().item(), 1e-12)
    exact, reference = nonnegative_qp(cosines, cosines), cvxpy_nonnegative_qp(cosines, cosines)
    same(reference.value @ cosines, exact.value @ cosines, 1.0)
    exact, reference = min_norm(gram), cvxpy_min_norm(gram)
    same(reference.value @ jac, exact.value @ jac, size)
    exact, reference = cagrad_point(gram, 0.5), cvxpy_cagrad(gram, 0.5)
    same(reference.value @ jac, exact.value @ jac, size)
    exact, reference = nash_point(gram), cvxpy_nash(gram)
    assert reference.converged == exact.converged
    same(reference.value @ jac, exact.value @ jac, size)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_scale_plays_no_part(size: float) -> None:
    jac = draw("conflicting", 4)
    small = jac * size
    for solve in (cvxpy_min_norm, cvxpy_nash, lambda gram: cvxpy_cagrad(gram, 0.5)):
        factor = size if solve is cvxpy_nash else 1.0
        found, judge = solve(small @ small.T), solve(jac @ jac.T)
        assert found.converged
        same(found.value * factor, judge.value, 1.0)


@pytest.mark.parametrize("size", [1e-8 * (1 + k / 999) for k in range(6)] + [1e8])
def test_the_reference_stays_a_judge_where_tasks_are_nearly_opposed(size: float) -> None:
    """Rounding alone must not make Clarabel stop early: the problem is posed in its own units."""
    jac = conflicting(8, seed=8) * size
    found = cvxpy_nash(jac @ jac.T, alpha=2.0)
    assert found.converged
    assert found.residual < 5e-5


def test_without_cvxpy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    rule = make_rule("upgrad", solver="cvxpy")
    message = (
        r'^The solver "cvxpy" needs cvxpy, which is not installed; run '
        r'`pip install "gradbal\[cvxpy\]"`\.$'
    )
    with pytest.raises(ModuleNotFoundError, match=message):
        aggregate(torch.eye(2), rule)
    assert aggregate(torch.eye(2), "upgrad").direction.tolist() == [0.5, 0.5]


def test_device_bound_callers_are_turned_away() -> None:
    gram = torch.eye(2, dtype=torch.float64)
    message = (
        r"^The reference solvers need `capturable=False`, got True: CVXPY runs on the host\. "
        r"Use the rule's exact solver\.$"
    )
    for solve in (cvxpy_min_norm, cvxpy_nash):
        with pytest.raises(ValueError, match=message):
            solve(gram, capturable=True)
    with pytest.raises(ValueError, match=message):
        cvxpy_cagrad(gram, 0.5, capturable=True)
    with pytest.raises(ValueError, match=message):
        cvxpy_nonnegative_qp(gram, gram, capturable=True)
