"""The law of GradDrop: in every entry p with probability p / (p + q), else -q."""

import math

import pytest
import torch
from cases import J3, rows
from torch import Tensor

from gradbal import aggregate, make_rule

DRAWS = 20_000
UP, DOWN = [2.0, 4.0, 3.0, 6.0], [1.0, 4.0, 0.0, 1.0]  # of J3


def draws(leak: float = 0.0) -> Tensor:
    """One row per draw, one column per column of J3."""
    many = rows(J3).repeat(1, DRAWS)
    return aggregate(many, make_rule("graddrop", leak=leak)).direction.reshape(DRAWS, 4)


def test_every_entry_is_one_of_two() -> None:
    up, down = torch.tensor(UP, dtype=torch.float64), torch.tensor(DOWN, dtype=torch.float64)
    found = draws()
    assert ((found == up) | (found == -down)).all()


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_mean_and_variance(leak: float) -> None:
    found = draws(leak)
    for column, up, down in zip(found.T, UP, DOWN, strict=True):
        variance = up * down * (1 - leak) ** 2
        assert abs(column.mean() - (up - down)) <= 4 * math.sqrt(variance / DRAWS) + 1e-12
        squares = (column - (up - down)).square()
        error = (squares.var() / DRAWS).sqrt()
        assert abs(squares.mean() - variance) <= 4 * error + 1e-12


def test_share_of_positive_entries() -> None:
    shares = (draws() > 0).double().mean(dim=0)
    expected = torch.tensor([2 / 3, 0.5, 1.0, 6 / 7], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / math.sqrt(DRAWS))


def test_sum_where_signs_agree_and_with_full_leak() -> None:
    jacobian = rows([[1, -2, 0, 3], [4, -1, 0, 0]])
    assert torch.equal(aggregate(jacobian, "graddrop").direction, jacobian.sum(dim=0))
    whole = aggregate(rows(J3), make_rule("graddrop", leak=1.0)).direction
    assert torch.equal(whole, rows(J3).sum(dim=0))


def test_every_step_draws_anew() -> None:
    jacobian = rows([[1], [-1]]).repeat(1, 64)
    first = aggregate(jacobian, "graddrop")
    second = aggregate(jacobian, "graddrop", state=first.state)
    assert not torch.equal(first.direction, second.direction)
