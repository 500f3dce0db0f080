"""Expert banks: the backends agree in outputs, gradients, statistics and state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from arch_zoo import ExpertBank


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 7, bias=False),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(7, 4)),
        nn.GELU(),
    )


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


VECTORS, TOKENS, IMAGES = (5, 3), (5, 6, 3), (5, 3, 6, 7)
AGREEING: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (perceptron, VECTORS, "bmm"),
    (perceptron, TOKENS, "bmm"),
    (perceptron, TOKENS, "vmap"),
    (lambda: nn.Linear(3, 4), VECTORS, "bmm"),
    (Residual, VECTORS, "vmap"),
    (convolution, IMAGES, "vmap"),
]


def pair(factory: Callable[[], nn.Module], backend: str) -> tuple[ExpertBank, ExpertBank]:
    torch.manual_seed(0)
    bank = ExpertBank([factory().double() for _ in range(3)], backend=backend)
    return bank, ExpertBank(bank.to_modules(), backend="loop")


def state(bank: ExpertBank) -> dict[str, Tensor]:
    modules = [module.state_dict() for module in bank.to_modules()]
    return {name: torch.stack([m[name] for m in modules]) for name in modules[0]}


@pytest.mark.parametrize(("factory", "shape", "backend"), AGREEING)
def test_backends_agree(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], backend: str
) -> None:
    fast, slow = pair(factory, backend)
    assert (fast.backend, slow.backend) == (backend, "loop")
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        outputs = [bank.train(training)(x) for bank in (fast, slow)]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        for bank, y in zip((fast, slow), outputs, strict=True):
            torch.optim.SGD(bank.parameters(), lr=0.1).zero_grad()
            y.sin().sum().backward()
        grads = dict(fast.experts.named_parameters())
        for name, parameter in grads.items():
            singles = [expert.get_parameter(name).grad for expert in slow.experts]
            torch.testing.assert_close(parameter.grad, torch.stack(singles), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state(fast), state(slow), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("factory", "shape", "backend"), AGREEING)
def test_experts_start_as_they_would_alone(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], backend: str
) -> None:
    torch.manual_seed(0)
    alone = [factory().state_dict() for _ in range(2)]
    torch.manual_seed(0)
    bank = ExpertBank(factory, 2, backend=backend)
    for ours, module in zip(alone, bank.to_modules(), strict=True):
        torch.testing.assert_close(ours, module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("factory", "backend"),
    [
        (perceptron, "bmm"),
        (convolution, "loop"),
        (Residual, "loop"),
        (lambda: nn.LazyLinear(4), "loop"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "loop"),
        (nn.Identity, "loop"),
    ],
)
def test_auto_takes_what_suits(factory: Callable[[], nn.Module], backend: str) -> None:
    assert ExpertBank(factory, 2).backend == backend


def test_auto_loops_over_experts_that_differ_or_are_tied() -> None:
    assert ExpertBank([nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.ReLU())]).n == 2
    assert ExpertBank([nn.ReLU(), nn.Tanh()]).backend == "loop"
    layer = nn.Linear(3, 3)
    assert ExpertBank(lambda: nn.Sequential(layer, nn.ReLU(), layer), 2).backend == "loop"


def test_one_module_may_stand_twice() -> None:
    layer, x = nn.Linear(3, 4), torch.ones(2, 3)
    bank = ExpertBank([layer, layer], backend="loop")
    assert torch.equal(bank(x), torch.stack([layer(x), layer(x)], dim=1))


@pytest.mark.parametrize("backend", ["bmm", "vmap"])
def test_frozen_experts_stay_frozen(backend: str) -> None:
    bank = ExpertBank(lambda: nn.Linear(3, 4).requires_grad_(False), 2, backend=backend)
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    assert not bank(torch.ones(2, 3)).requires_grad


def test_experts_drop_out_by_themselves() -> None:
    torch.manual_seed(0)
    for backend in ("bmm", "vmap"):
        bank = ExpertBank(lambda: nn.Sequential(nn.Linear(3, 50), nn.Dropout()), 2, backend=backend)
        dropped = bank(torch.ones(4, 3)) == 0
        assert dropped.any()
        assert not torch.equal(dropped[:, 0], dropped[:, 1])


@pytest.mark.slow
def test_mapped_bank_compiles_whole() -> None:
    bank, _ = pair(convolution, "vmap")
    x = torch.ones(IMAGES, dtype=torch.float64)
    compiled = torch.compile(bank.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), bank(x))
    torch.compiler.reset()
