"""The small optimizers of learned weights, against torch's own."""

import pytest
import torch
from torch import Tensor

from gradbal.rules._base import Rule, State
from gradbal.rules._learned import advance, slots

STEPS = 12


def gradients() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, 4, generator=generator, dtype=torch.float64)


def start(learner: str) -> State:
    value = torch.linspace(-1, 1, 4, dtype=torch.float64)
    return {"logits": value, **slots("logits", value, learner)}


@pytest.mark.parametrize("lr", [0.025, torch.tensor(0.1, dtype=torch.float64)])
@pytest.mark.parametrize("learner", ["adam", "sgd"])
def test_steps_are_those_of_torch(learner: str, lr: float | Tensor) -> None:
    state = start(learner)
    param = torch.nn.Parameter(state["logits"].clone())
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimizer = kinds[learner]([param], lr=float(lr))
    everyone = torch.ones(4, dtype=torch.bool)
    for grad in gradients():
        param.grad = grad.clone()
        optimizer.step()
        advance(Rule(), state, "logits", grad, everyone, lr, learner)
        torch.testing.assert_close(state["logits"], param.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("learner", ["adam", "sgd"])
def test_what_does_not_move_is_as_if_the_steps_had_not_been(learner: str) -> None:
    state, alone = start(learner), start(learner)
    everyone = torch.ones(4, dtype=torch.bool)
    for number, grad in enumerate(gradients()):
        moving = everyone.clone()
        moving[2] = number % 3 == 0
        advance(Rule(), state, "logits", grad, moving, 0.1, learner)
        if moving[2]:
            advance(Rule(), alone, "logits", grad, everyone, 0.1, learner)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor[2], alone[name][2], rtol=0, atol=0)


def test_tensors_are_replaced_and_not_written_into() -> None:
    state = start("adam")
    before = dict(state)
    copies = {name: tensor.clone() for name, tensor in state.items()}
    advance(Rule(), state, "logits", gradients()[0], torch.ones(4, dtype=torch.bool), 0.1, "adam")
    for name, tensor in before.items():
        assert torch.equal(tensor, copies[name])
        assert not torch.equal(state[name], tensor)
