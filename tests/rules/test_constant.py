"""Constant weights are used as they are, whoever is present."""

import pytest
import torch

from gradbal import MTLOptimizer, chain, make_rule


def test_absent_tasks_leave_the_others_as_they_are() -> None:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule = make_rule("constant", weights=[1.0, 2.0, 0.5])
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule, tasks=["a", "b", "c"])
    for here, expected in [("abc", [1.0, 2.0, 0.5]), ("ca", [0.5, 1.0]), ("b", [2.0])]:
        mtl_opt.step(dict.fromkeys(here, parameter * 3))
        assert mtl_opt.last is not None
        assert mtl_opt.last.weights is not None
        assert mtl_opt.last.weights.tolist() == expected


def test_in_a_chain() -> None:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule = chain("log_losses", make_rule("constant", weights=[1.0, 3.0]))
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule)
    mtl_opt.step([parameter * 2, parameter * 4])
    assert mtl_opt.last is not None
    assert mtl_opt.last.weights is not None
    assert mtl_opt.last.weights.tolist() == [0.5, 0.75]


def test_one_for_each_task() -> None:
    sentence = "^Constant: `weight` must have one number for each of the 3 tasks, got 2.$"
    with pytest.raises(ValueError, match=sentence):
        MTLOptimizer(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0),
            make_rule("constant", weights=[1.0, 2.0]),
            tasks=3,
        )
