import re

import pytest
import torch
from torch import nn

from arch_zoo.automtl import Temperature
from arch_zoo.automtl.presets import CITYSCAPES, NYUV2, SMALL, TASKONOMY, Preset, Recipe


def cooled(preset: Preset) -> float:
    """Return the temperature after the search."""
    tau = Temperature(preset.tau_start, preset.tau_factor, preset.tau_every)
    for step in range(preset.search.steps):
        if preset.of_policy(step):
            tau.step()
    return tau().item()


@pytest.mark.parametrize(
    ("preset", "tau"), [(CITYSCAPES, 1.246), (NYUV2, 0.147), (TASKONOMY, 0.147)]
)
def test_published_schedules_end_at_the_published_temperature(preset: Preset, tau: float) -> None:
    assert cooled(preset) == pytest.approx(tau, abs=5e-4)


def test_the_small_schedule_ends_nearly_hard() -> None:
    assert 0.05 < cooled(SMALL) < 0.3


def test_turns_of_policy_and_weights() -> None:
    turns = [CITYSCAPES.of_policy(step) for step in range(1000)]
    assert turns == 2 * (100 * [True] + 400 * [False])


def test_rates_drop_when_they_were_published_to() -> None:
    last, policy = CITYSCAPES.posttrain.recipe, CITYSCAPES.policy
    optimizer = last.optimizer([torch.zeros(1)])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["betas"] == (0.5, 0.999)
    for recipe, step, rate in [
        (last, 0, 1e-3),
        (last, 3_999, 1e-3),
        (last, 4_000, 5e-4),
        (last, 29_999, 1e-3 / 2**7),
        (policy, 9_999, 1e-2),
        (policy, 49_999, 1e-3),
    ]:
        recipe.set_rate(optimizer, step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_optimizers_have_the_options_of_their_kind() -> None:
    model = nn.Linear(2, 2)
    sgd = NYUV2.search.recipe.optimizer(model.parameters())
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (1e-3, 0.9)
    assert sgd.defaults["weight_decay"] == 1e-4
    whole = "^" + re.escape("Recipe: `kind` must be 'adam' or 'sgd', got 'rmsprop'.") + "$"
    with pytest.raises(ValueError, match=whole):
        Recipe(kind="rmsprop")
