"""Krum beside its definition, written out on the gradients themselves."""

import re

import pytest
import torch
from cases import J3, decades, normal, rows
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.rules._base import Context, GramRule

FIVE = rows([[1, 0], [1.2, 0.1], [0.9, -0.2], [-5, 4], [0.5, 0.45]])  # one far from the others


def scores(jacobian: Tensor, f: int, squared: bool) -> Tensor:
    found = []
    for i, own in enumerate(jacobian):
        others = torch.cat((jacobian[:i], jacobian[i + 1 :]))
        distances = (others - own).norm(dim=1).sort().values[: len(jacobian) - f - 2]
        found.append((distances**2 if squared else distances).sum())
    return torch.stack(found)


def weights_of(jacobian: Tensor, **options: object) -> Tensor:
    weights = aggregate(jacobian, make_rule("krum", **options)).weights
    assert weights is not None
    return weights


def test_scores_of_the_sheet() -> None:
    expected = rows([[0.1, 0.23, 0.23, 94.8525, 1.035]])[0]
    torch.testing.assert_close(scores(FIVE, 1, True), expected)
    expected = rows([[0.447214, 0.647871, 0.647871, 13.757285, 1.435898]])[0]
    torch.testing.assert_close(scores(FIVE, 1, False), expected, rtol=0, atol=1e-6)
    for squared in (True, False):
        result = aggregate(FIVE, make_rule("krum", n_byzantine=1, squared=squared))
        torch.testing.assert_close(result.direction, rows([[1, 0]])[0])
    torch.testing.assert_close(weights_of(FIVE), rows([[1, 0, 0, 0, 0]])[0])


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("m", "f"), [(4, 0), (5, 1), (7, 2), (8, 5), (16, 3), (40, 10)])
def test_lowest_scores(m: int, f: int, scale: float, squared: bool) -> None:
    for jacobian in (normal(m, 6, seed=m), decades(m, seed=m)):
        for selected in (1, 2, m):
            options = {"n_byzantine": f, "n_selected": selected, "squared": squared}
            lowest = scores(jacobian, f, squared).argsort()[:selected]
            expected = torch.zeros(m, dtype=torch.float64).index_fill(0, lowest, 1 / selected)
            torch.testing.assert_close(weights_of(scale * jacobian, **options), expected)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize(("m", "f"), [(4, 0), (5, 1), (8, 3), (40, 10)])
def test_lowest_scores_on_the_device(m: int, f: int, squared: bool) -> None:
    for jacobian in (normal(m, 6, seed=m), decades(m, seed=m)):
        for selected in (1, 2):
            rule = make_rule("krum", n_byzantine=f, n_selected=selected, squared=squared)
            assert isinstance(rule, GramRule)
            ctx = Context(losses=torch.ones(m), state={}, capturable=True)
            lowest = scores(jacobian, f, squared).argsort()[:selected]
            expected = torch.zeros(m, dtype=torch.float64).index_fill(0, lowest, 1 / selected)
            found = rule.weights(jacobian @ jacobian.T, ctx)
            assert isinstance(found, Tensor)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("squared", [True, False])
def test_the_first_of_equal_scores(squared: bool) -> None:
    cross = rows([[1, 0], [0, 1], [-1, 0], [0, -1]]) + rows([[3, 0.1]])
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        for size in (1.0, 0.1, 1e-7):
            jacobian = size * cross[order]
            assert weights_of(jacobian, squared=squared).tolist() == [1, 0, 0, 0]
            two = weights_of(jacobian, squared=squared, n_selected=2)
            assert two.tolist() == [0.5, 0.5, 0, 0]
    assert weights_of(rows(J3)).sum() == 1


def test_liars_are_ignored_and_a_common_shift_changes_nothing() -> None:
    honest = 0.1 * normal(9, 4, seed=1) + 1
    liars = 1e3 * normal(3, 4, seed=2)
    jacobian = torch.cat((liars, honest))
    weights = weights_of(jacobian, n_byzantine=3, n_selected=5)
    assert weights[:3].tolist() == [0, 0, 0]
    assert torch.equal(weights_of(jacobian + 0.5, n_byzantine=3, n_selected=5), weights)


def test_one_and_two_tasks() -> None:
    assert weights_of(rows([[1, 2]])).tolist() == [1]
    assert weights_of(rows([[1, 2], [3, 4]])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"n_byzantine": 1},
            "Krum: `n_byzantine` must be at most the number of tasks minus 3, got 1 with 3 tasks.",
        ),
        ({"n_selected": 4}, "Krum: `n_selected` must be between 1 and 3, got 4."),
    ],
)
def test_too_few_tasks(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        aggregate(rows(J3), make_rule("krum", **options))
