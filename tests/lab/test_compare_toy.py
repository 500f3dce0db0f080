"""The two-parameter toy: its losses, its Pareto set, and who reaches it from where."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradbal.cli import main
from gradbal.lab.toy.problem import (
    CENTRE,
    NEAR,
    PROTOCOLS,
    Way,
    distance,
    losses,
    pareto_front,
    paths,
)
from gradbal.lab.toy.runs import arrivals

FAR, CORNER = (-8.5, 7.5), (9.0, 9.0)  # the two starts that have to cross a valley
NASH = PROTOCOLS["nash"]
Run = tuple[str, tuple[float, float]]


def slopes(points: Tensor, scale: float = 1.0) -> Tensor:
    """Return the gradients of both losses, shape ``[n, 2, 2]``."""
    points = points.clone().requires_grad_()
    found = losses(points, scale)
    rows = [torch.autograd.grad(found[:, k].sum(), points, retain_graph=True)[0] for k in (0, 1)]
    return torch.stack(rows, dim=1)


def front(n: int = 29) -> Tensor:
    x = torch.linspace(-CENTRE, CENTRE, n, dtype=torch.float64)
    return torch.stack([x, pareto_front(x)], dim=1)


# ---------------------------------------------------------------------- the problem


def plain(x: float, y: float) -> list[float]:
    """Return the losses in plain numbers."""
    first, second = 0.5 * (-x - 7) + math.tanh(y), 0.5 * (-x + 3) - math.tanh(y) + 2
    logs = [math.log(max(abs(u), 5e-6)) + 6 for u in (first, second)]
    bowls = [((x - c) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20 for c in (7, -7)]
    above, below = max(math.tanh(y / 2), 0), max(math.tanh(-y / 2), 0)
    return [above * h + below * q for h, q in zip(logs, bowls, strict=True)]


@pytest.mark.parametrize("point", [(-8.5, 7.5), (0.0, 0.0), (3.0, -4.0), (-5.0, 1.0)])
def test_losses_are_those_of_the_papers_programs(point: tuple[float, float]) -> None:
    points = torch.tensor(point, dtype=torch.float64)
    first, second = plain(*point)
    assert losses(points).tolist() == pytest.approx([first, second])
    assert losses(points, 0.1).tolist() == pytest.approx([0.1 * first, second])


def test_at_the_origin_both_gradients_point_along_y() -> None:
    """Both halves of the plane have a slope there, whatever slope ``clamp`` has at its bound."""
    found = slopes(torch.zeros(1, 2))[0]
    assert found[:, 0].tolist() == [0, 0]
    assert (found[:, 1] != 0).all()


def test_the_pareto_set_is_where_gradients_cancel() -> None:
    points = front()
    for scale in (1.0, 0.1):
        found = slopes(points, scale)
        share = (points[:, 0] + CENTRE) / (2 * CENTRE)
        weights = torch.stack([share / scale, 1 - share], dim=1)
        torch.testing.assert_close(
            torch.einsum("nk,nkd->nd", weights, found), torch.zeros_like(points), atol=1e-12, rtol=0
        )


def test_the_pareto_set_as_published() -> None:
    ends = pareto_front(torch.tensor([-7.0, 0.0, 7.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([-8.4345, -8.3551, -8.4345], abs=5e-5)
    values = losses(front())
    assert values.min().item() == pytest.approx(-20, abs=0.05)
    assert values.max().item() == pytest.approx(-0.4, abs=0.05)
    assert distance(front()).max() < 1e-12
    assert distance(torch.tensor([[9.0, -8.4345], [0.0, 0.0]])).tolist() == pytest.approx(
        [2, 8.3551], abs=1e-4
    )


@pytest.mark.parametrize(("scale", "x", "y"), [(1.0, 0.0, -8.3551), (0.1, -5.7273, -8.4094)])
def test_the_sum_has_its_minimum_on_the_pareto_set(scale: float, x: float, y: float) -> None:
    point = torch.tensor([[x, y]], dtype=torch.float64)
    assert slopes(point, scale).sum(dim=1).abs().max() < 1e-4
    assert distance(point).item() < 1e-4


# ---------------------------------------------------------------------- who gets there


def test_adam_takes_the_first_step_and_the_length_is_that_of_the_program() -> None:
    start = (3.0, -4.0)
    moved = paths([("ew", start)], NASH, 1)[1, 0] - torch.tensor(start)
    signs = slopes(torch.tensor([start]), 0.1).sum(dim=(0, 1)).sign()
    torch.testing.assert_close(moved, -1e-3 * signs, atol=1e-6, rtol=0)
    factors = {name: NASH.rule(name)[1] for name in ("ew", "pcgrad", "mgda", "cagrad", "nash_mtl")}
    assert factors == {"ew": 1, "pcgrad": 1, "mgda": 2, "cagrad": 2, "nash_mtl": 1}
    means = {name: PROTOCOLS["cagrad"].rule(name)[1] for name in ("ew", "pcgrad", "mgda", "cagrad")}
    assert means == {"ew": 0.5, "pcgrad": 0.5, "mgda": 1, "cagrad": 1}


def test_arrivals_are_those_that_stay() -> None:
    there, away = (0.0, -8.3551), (0.0, 0.0)
    ways = [[there] * 3, [away, there, away], [away, away, there], [away, there, there]]
    frames = torch.tensor(ways).transpose(0, 1)
    assert arrivals(frames, 20) == [0, -1, 20, 10]


@pytest.fixture(scope="module")
def ends() -> dict[Run, tuple[float, float]]:
    """Follow who has to cross a valley until most have arrived: where, and how far from the front.

    The protocol is Nash-MTL's; FAMO's differs for this rule in nothing but the steps.
    """
    names = ("ew", "pcgrad", "mgda", "nash_mtl", "famo")
    runs: list[Run] = [*((name, CORNER) for name in names), ("nash_mtl", FAR), ("ew", FAR)]
    runs.append(("ew", (0.0, 0.0)))
    last = paths(runs, NASH, 24_500)[-1]
    found = zip(last[:, 0].tolist(), distance(last).tolist(), strict=True)
    return dict(zip(runs, found, strict=True))


@pytest.mark.slow
def test_the_plain_sum_and_pcgrad_fail_from_the_corner(
    ends: dict[Run, tuple[float, float]],
) -> None:
    assert min(ends[name, CORNER][1] for name in ("ew", "pcgrad")) > 5


@pytest.mark.slow
def test_others_cross_the_valleys(ends: dict[Run, tuple[float, float]]) -> None:
    arrived = [("mgda", CORNER), ("nash_mtl", CORNER), ("nash_mtl", FAR), ("famo", CORNER)]
    assert max(ends[run][1] for run in arrived) < NEAR
    assert abs(ends["nash_mtl", CORNER][0]) < 4  # the middle of the front
    assert abs(ends["famo", CORNER][0]) < 2


@pytest.mark.slow
def test_the_plain_sum_is_late_where_it_has_to_cross(ends: dict[Run, tuple[float, float]]) -> None:
    x, away = ends["ew", (0.0, 0.0)]
    assert away < NEAR
    assert x == pytest.approx(-5.727, abs=1e-2)  # where the sum is least
    assert ends["ew", FAR][1] > 1


def test_all_leave_the_start_for_the_front() -> None:
    """The short version of the tests that are slow: 300 steps from the edge of both bowls."""
    start = (0.0, 0.0)
    ways = paths([(name, start) for name in ("ew", "pcgrad", "mgda", "nash_mtl")], NASH, 300)
    away = distance(ways)
    assert (away[-1] < away[0] - 0.2).all()
    assert (ways[-1, :, 1] < -0.2).all()


def test_a_program_clips_some_rules_only() -> None:
    for name, clipped in (("pcgrad", True), ("mgda", False)):
        way = Way(name, PROTOCOLS["famo"], 0)
        rows = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        length = way.direction(rows, torch.ones(2)).norm().item()
        assert length == pytest.approx(1 if clipped else 10)


def test_the_command_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "toy", "--rules", "ew,si,mgda", "--steps", "20", "--copies", "2"]
    for _ in range(2):  # the second time nothing is left to run but what failed
        assert main([*words, "--out", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        lines = [line.strip("| ").split(" | ") for line in shown.splitlines() if line[:1] == "|"]
        assert lines[0][:3] == ["rule", "(-8.5, 7.5)", "(0, 0)"]
        assert [line[0] for line in lines[2:]] == ["ew", "mgda"]
        assert lines[2][1] == "0 of 2"
        assert "si fails: ValueError: " in shown
    assert (tmp_path / "toy_nash.png").stat().st_size > 20_000
    assert len((tmp_path / "toy.jsonl").read_text().splitlines()) == 2
    assert main(["compare", "toy", "--rules", "si", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("si fails: ")
