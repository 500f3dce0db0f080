"""PIVRG: what scores do, and how new ones come in while training."""

import math

import pytest
import reference
import torch
from cases import J3, normal, rows

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.step.weighting import MODEL


def demand(scores: list[float], bound: float, min_temperature: float) -> torch.Tensor:
    """A softmax whose largest ratio is at most the bound."""
    temperature = max((max(scores) - min(scores)) / math.log(bound), min_temperature)
    return len(scores) * torch.tensor([score / temperature for score in scores]).double().softmax(0)


@pytest.mark.parametrize("min_temperature", [1.0, 10.0, 1e6])
@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [3.0, -1.0, 2.0], [-200.0, 500.0, 1.0]])
def test_equations(scores: list[float], min_temperature: float) -> None:
    options = {"bound": 1.8, "min_temperature": min_temperature, "scores": tuple(scores)}
    asked = demand(scores, 1.8, min_temperature)
    assert asked.max() <= max(1.8, math.exp(4 / min_temperature)) * asked.min()
    for jacobian in (rows(J3), normal(3, 9, seed=1) * rows([[1], [1e5], [1e-5]])):
        weights = aggregate(jacobian, make_rule("pivrg", **options)).weights
        assert weights is not None
        assert reference.nash_residual(jacobian, weights, 2.0, asked) <= 1e-8


def test_equal_scores_and_a_bound_of_one_are_fairgrad() -> None:
    fair = aggregate(rows(J3), "fairgrad").weights
    for options in ({"scores": (7.0, 7.0, 7.0)}, {"scores": (1.0, 5.0, 900.0), "bound": 1.0}):
        torch.testing.assert_close(aggregate(rows(J3), make_rule("pivrg", **options)).weights, fair)


def test_new_scores_after_an_epoch() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    base = torch.optim.SGD([parameter], lr=0.0)
    mtl_opt = MTLOptimizer(base, make_rule("pivrg", scores=(0.0, 0.0, 0.0)))

    def weights() -> torch.Tensor:
        mtl_opt.step(list(rows(J3) @ parameter))
        assert mtl_opt.last is not None
        assert mtl_opt.last.weights is not None
        return mtl_opt.last.weights

    before = weights()
    torch.testing.assert_close(before, aggregate(rows(J3), "pivrg").weights)
    mtl_opt.end_epoch(scores=[10.0, -5.0, 0.0])
    expected = rows([[0.529948, 0.264974, 0.181439]])[0]
    torch.testing.assert_close(weights(), expected, rtol=0, atol=1e-6)
    saved = mtl_opt.core.contents()
    assert saved["state"]["groups"][MODEL]["scores"].tolist() == [10, -5, 0]
    torch.testing.assert_close(weights(), expected, rtol=0, atol=1e-6)
