import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, draw, rows

from gradbal.solvers import equilibrate


@settings(derandomize=True, deadline=None, max_examples=30)
@given(m=st.integers(1, 12), decades=st.floats(0, 140), seed=st.integers(0, 99))
def test_gives_back_the_gram_matrix(m: int, decades: float, seed: int) -> None:
    jac = draw("well_conditioned", m, seed)
    jac *= 10 ** torch.linspace(-decades, decades, m, dtype=torch.float64).unsqueeze(1)
    gram = jac @ jac.T
    cosines, norms = equilibrate(gram)
    assert torch.equal(cosines, cosines.T)
    assert torch.equal(cosines.diagonal(), torch.ones(m, dtype=torch.float64))
    torch.testing.assert_close(norms, jac.norm(dim=1))
    unit = jac / jac.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines, unit @ unit.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_entries_near_the_ends_of_the_range(size: float) -> None:
    gram = size * rows([[4, -3], [-3, 9]])
    cosines, norms = equilibrate(gram)
    torch.testing.assert_close(cosines, rows([[1, -0.5], [-0.5, 1]]))
    torch.testing.assert_close(norms, size**0.5 * rows([[2, 3]])[0])


def test_zero_rows_are_exactly_zero() -> None:
    jac = rows(EDGES["two_zero_rows"])
    cosines, norms = equilibrate(jac @ jac.T)
    assert torch.equal(norms == 0, torch.tensor([True, False, True, False]))
    assert torch.equal(cosines.abs().sum(0) == 0, norms == 0)


def test_no_absolute_threshold() -> None:
    cosines, norms = equilibrate(torch.diag(torch.tensor([1e-300, 1.0], dtype=torch.float64)))
    assert torch.equal(cosines, torch.eye(2, dtype=torch.float64))
    assert norms[0] > 0


def test_not_a_number_is_not_hidden() -> None:
    cosines, _ = equilibrate(rows([[float("nan"), 0], [0, 1]]))
    assert cosines[0].isnan().any()
