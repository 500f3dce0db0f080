"""Policies and regularisers of AutoMTL."""

import math

import pytest
import torch
from torch import Tensor

from arch_zoo.automtl import DepthWeighted, ExpectedCost, Policy, Temperature

DEPTH = (1, 2, 2, 4)


def policy(skippable: tuple[bool, ...] = (True, True, True, False), tasks: str = "ab") -> Policy:
    n = len(skippable)
    legal = torch.tensor([[True, True, skip] for skip in skippable])
    sizes = torch.tensor([[10.0 * k, 10.0 * k, 1.0] for k in range(1, n + 1)])
    return Policy(tasks, legal, torch.tensor(DEPTH[:n]), sizes, 100 * sizes)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everywhere(*rows: list[float], tasks: str = "a") -> dict[str, Tensor]:
    return {task: torch.tensor(rows, requires_grad=True) for task in tasks}


# ---------------------------------------------------------------------- temperature


@pytest.mark.parametrize(("steps", "expected"), [(0, 5.0), (4_000, 1.246), (10_000, 0.147)])
def test_published_temperatures(steps: int, expected: float) -> None:
    tau = Temperature()
    tau.steps.fill_(steps)
    assert tau().item() == pytest.approx(expected, abs=5e-4)


def test_temperature_is_the_closed_form_at_every_step() -> None:
    tau = Temperature(start=3.0, factor=0.5, every=4)
    for n in range(20):
        assert tau().item() == pytest.approx(3.0 * 0.5 ** (n // 4))
        tau.step()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": 0.0}, "`start` must be finite and > 0, got 0.0"),
        ({"start": math.inf}, "`start` must be finite and > 0, got inf"),
        ({"factor": 1.5}, "`factor` must be above 0 and at most 1, got 1.5"),
        ({"every": 0}, "`every` must be >= 1, got 0"),
    ],
)
def test_temperature_refuses(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^Temperature: {sentence}\\.$"):
        Temperature(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- samples


@pytest.mark.parametrize("hard", [False, True])
def test_samples_are_probabilities_and_never_illegal(hard: bool) -> None:
    model = policy()
    model.tau.steps.fill_(5_000)
    for seed in range(20):
        for rows in model.sample(seeded(seed), hard).values():
            assert (rows >= -1e-6).all()
            torch.testing.assert_close(rows.sum(dim=-1), torch.ones(4))
            assert rows[3, 2] == 0


def test_hard_samples_are_one_hot_with_the_gradient_of_soft_ones() -> None:
    model, weights = policy(), torch.randn(4, 3, generator=seeded())
    rows, found = {}, {}
    for hard in (False, True):
        rows[hard] = model.sample(seeded(3), hard)["a"]
        (found[hard],) = torch.autograd.grad((rows[hard] * weights).sum(), model.logits["a"])
    assert set(rows[True].detach().flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(rows[True].argmax(dim=-1), rows[False].argmax(dim=-1))
    torch.testing.assert_close(found[True], found[False])
    assert found[True].isfinite().all()
    assert found[True][3, 2] == 0


def test_a_generator_repeats_samples_and_draws() -> None:
    model = policy()
    for make in (model.sample, model.draw):
        first, second, third = make(seeded(0)), make(seeded(0)), make(seeded(1))
        assert torch.equal(first["b"], second["b"])
        assert not torch.equal(first["a"], first["b"])
        assert not torch.equal(first["b"], third["b"])


def test_draws_follow_the_softmax_whatever_the_temperature() -> None:
    model = policy((True,) * 4, "a")
    model.tau.steps.fill_(5_000)
    model.logits["a"].data = torch.tensor([[0.0, 1.0, -1.0]]).repeat(4, 1)
    generator = seeded()
    draws = torch.stack([model.draw(generator)["a"] for _ in range(2_000)])
    assert not draws.requires_grad
    expected = torch.tensor([0.0, 1.0, -1.0]).softmax(0)
    torch.testing.assert_close(draws.mean(dim=(0, 1)), expected, atol=0.02, rtol=0)


def test_likeliest_branches() -> None:
    model = policy()
    assert all(torch.equal(p.argmax(-1), torch.zeros(4).long()) for p in model.argmax().values())
    model.logits["b"].data[:, 1] = 1.0
    model.logits["b"].data[2:, 2] = 9.0
    assert model.argmax()["b"].tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]


def test_uniform_is_the_mean_of_legal_branches() -> None:
    model = policy()
    model.logits["a"].data.normal_(generator=seeded())
    for rows in model.uniform().values():
        assert not rows.requires_grad
        torch.testing.assert_close(rows[0], torch.full((3,), 1 / 3))
        assert rows[3].tolist() == [0.5, 0.5, 0.0]


def test_entropy_in_nats() -> None:
    model = policy()
    model.logits["b"].data[:, 0] = 100.0
    expected = torch.tensor([math.log(3)] * 3 + [math.log(2)])
    torch.testing.assert_close(model.entropy()["a"], expected)
    torch.testing.assert_close(model.entropy()["b"], torch.zeros(4))
    assert not model.entropy()["a"].requires_grad


def test_state_holds_logits_and_the_temperature() -> None:
    model, other = policy(), policy()
    model.tau.steps.fill_(500)
    model.logits["a"].data.normal_(generator=seeded())
    assert sorted(model.state_dict()) == ["logits.a", "logits.b", "tau.steps"]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sample(seeded())["a"], model.sample(seeded())["a"])


# ---------------------------------------------------------------------- regularisers


@pytest.mark.parametrize(
    ("row", "expected"),
    [([1 / 3] * 3, 1.386), ([1.0, 0, 0], 0.627), ([0.0, 1, 0], 2.006), ([0.0, 0, 1], 2.006)],
)
def test_values_of_one_operator(row: list[float], expected: float) -> None:
    model = policy((True, True))  # depths 1 and 2, so the first one weighs a half
    value = DepthWeighted(scale=1.0)(everywhere(row, row), model)
    assert value.item() == pytest.approx(expected / 2, abs=5e-4)
    doubled = DepthWeighted(scale=1.0)(everywhere(row, row, tasks="ab"), model)
    assert doubled.item() == pytest.approx(2 * value.item())


def test_values_at_the_effective_scale() -> None:
    model = policy((True, True))
    assert DepthWeighted()(everywhere([1.0, 0, 0], [1.0, 0, 0]), model).item() == pytest.approx(
        0.005 / 2, abs=5e-4
    )
    assert DepthWeighted()(everywhere([0, 1.0, 0], [0, 1.0, 0]), model).item() == pytest.approx(
        6.7 / 2, abs=5e-2
    )


def test_gradient_on_the_logits_at_an_even_start() -> None:
    model = policy((True, True), "a")
    rows = {"a": model.logits["a"].softmax(-1)}
    (found,) = torch.autograd.grad(2 * DepthWeighted(1.0)(rows, model), model.logits["a"])
    torch.testing.assert_close(found, torch.tensor([[-1 / 3, 1 / 6, 1 / 6], [0.0, 0, 0]]))


def test_depths_weigh_and_the_deepest_operator_is_left_alone() -> None:
    model, rows = policy((True,) * 4), everywhere(*[[1 / 3] * 3] * 4)
    DepthWeighted()(rows, model).backward()
    steep = rows["a"].grad[:, 1]
    torch.testing.assert_close(steep / steep[0], torch.tensor([1, 2 / 3, 2 / 3, 0]))


@pytest.mark.parametrize("of", ["parameters", "operations"])
def test_expected_cost_of_sure_choices(of: str) -> None:
    model, cost = policy((True,) * 4), ExpectedCost(of)
    shared, specific, skip = ([row] * 4 for row in torch.eye(3).tolist())
    assert cost(everywhere(*shared, tasks="ab"), model).item() == pytest.approx(0.5)
    assert cost(everywhere(*specific, tasks="ab"), model).item() == pytest.approx(1)
    assert cost(everywhere(*skip, tasks="ab"), model).item() == pytest.approx(4 / 100)
    mixed = {"a": torch.tensor(shared), "b": torch.tensor(specific)}
    assert cost(mixed, model).item() == pytest.approx(1)


def test_expected_cost_is_the_mean_over_draws() -> None:
    model = policy((True,) * 4)
    for number, logits in enumerate(model.logits.values()):
        logits.data.normal_(generator=seeded(number))
    generator = seeded()
    drawn = torch.stack([ExpectedCost()(model.draw(generator), model) for _ in range(1_000)])
    rows = {task: logits.softmax(-1) for task, logits in model.logits.items()}
    assert ExpectedCost()(rows, model).item() == pytest.approx(drawn.mean().item(), abs=0.01)


def test_regularisers_refuse() -> None:
    with pytest.raises(ValueError, match=r"^DepthWeighted: `scale` must be > 0, got 0\.$"):
        DepthWeighted(0)
    whole = r"^ExpectedCost: `of` must be 'parameters' or 'operations', got 'time'\.$"
    with pytest.raises(ValueError, match=whole):
        ExpectedCost("time")
