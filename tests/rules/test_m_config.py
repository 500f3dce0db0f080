"""M-ConFIG against a slow, obvious version, with all tasks or one task a step."""

import torch
from cases import normal
from torch import Tensor, nn

from gradbal import MTLOptimizer, aggregate, make_rule

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Reference:
    """Algorithm 1 on flat vectors."""

    def __init__(self, m: int, n: int) -> None:
        self.averages, self.counts = torch.zeros(m, n, dtype=torch.float64), [0] * m
        self.past, self.squares = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
        self.calls = 0

    def step(self, tasks: list[int], grads: Tensor) -> Tensor:
        for task, grad in zip(tasks, grads, strict=True):
            self.counts[task] += 1
            self.averages[task] = BETA1 * self.averages[task] + (1 - BETA1) * grad
        if not all(self.counts):
            return torch.zeros_like(self.past)
        self.calls += 1
        scales = torch.tensor([1 - BETA1**count for count in self.counts], dtype=torch.float64)
        found = aggregate(self.averages / scales[:, None], "config").direction
        newest = found * (1 - BETA1**self.calls)
        single = (newest - BETA1 * self.past) / (1 - BETA1)
        self.squares = BETA2 * self.squares + (1 - BETA2) * single.square()
        self.past = newest
        return found / ((self.squares / (1 - BETA2**self.calls)).sqrt() + EPS)


def test_all_tasks_at_once() -> None:
    reference, state = Reference(3, 5), None
    for seed in range(6):
        jacobian = normal(3, 5, seed=seed)
        result = aggregate(jacobian, "m_config", state=state)
        torch.testing.assert_close(result.direction, reference.step([0, 1, 2], jacobian))
        state = result.state


class Net(nn.Module):
    """A vector that three tasks share."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(normal(5, seed=9))

    def loss(self, task: int, step: int) -> Tensor:
        return (self.shared - normal(5, seed=10 * step + task)).square().sum()


def test_one_task_a_step_takes_one_pass() -> None:
    net, reference = Net(), Reference(3, 5)
    base = torch.optim.SGD(net.parameters(), lr=0.01)
    mtl_opt = MTLOptimizer(base, "m_config", tasks=list("abc"), shared=[net.shared])
    for step in range(9):
        task = step % 3
        loss = net.loss(task, step)
        (grad,) = torch.autograd.grad(loss, net.shared, retain_graph=True)
        mtl_opt.step({"abc"[task]: loss})
        expected = reference.step([task], grad[None])
        torch.testing.assert_close(net.shared.grad, expected, rtol=1e-6, atol=1e-9)
        if step == 4:  # stopping and going on is going on
            saved = mtl_opt.state_dict()
            mtl_opt = MTLOptimizer(base, "m_config", tasks=list("abc"), shared=[net.shared])
            mtl_opt.load_state_dict(saved)


def test_a_new_task_holds_the_others_up_until_it_is_seen() -> None:
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.01)
    mtl_opt = MTLOptimizer(base, make_rule("m_config"), shared=[net.shared])
    mtl_opt.step({"a": net.loss(0, 0), "b": net.loss(1, 0)})
    assert net.shared.grad.norm() > 0
    mtl_opt = MTLOptimizer(base, make_rule("m_config"), tasks=list("abc"), shared=[net.shared])
    mtl_opt.step({"a": net.loss(0, 0), "b": net.loss(1, 0)})
    assert net.shared.grad.norm() == 0
    mtl_opt.step({"c": net.loss(2, 0)})
    assert net.shared.grad.norm() > 0
