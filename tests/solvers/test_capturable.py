"""Host and capturable paths give the same; the latter never reads from the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from solver_cases import EDGES, FAMILIES, GOLDEN, draw, rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradbal.solvers import (
    Solution,
    cagrad_point,
    combined_min_norm,
    equilibrate,
    min_norm,
    nash_point,
    nonnegative_qp,
    ray_descent,
    simplex_lp,
)


def projections(gram: Tensor, *, capturable: bool) -> Solution:
    cosines, _ = equilibrate(gram)
    return nonnegative_qp(cosines, cosines, capturable=capturable)


def cagrad(gram: Tensor, *, capturable: bool) -> Solution:
    return cagrad_point(gram, 0.5, capturable=capturable)


def without_ball(gram: Tensor, *, capturable: bool) -> Solution:
    return cagrad_point(gram, 0.0, capturable=capturable)


def fair(gram: Tensor, *, capturable: bool) -> Solution:
    return nash_point(gram, alpha=2.0, capturable=capturable)


def sum_falls(gram: Tensor, *, capturable: bool) -> Solution:
    return simplex_lp(gram.sum(0), gram, torch.zeros_like(gram[0]), capturable=capturable)


def onto_diagonal(gram: Tensor, *, capturable: bool) -> Solution:
    ray = torch.ones_like(gram[0])
    excess = torch.linspace(1, 2, len(gram), dtype=gram.dtype)
    return ray_descent(gram, ray, excess, eps=1e-16, capturable=capturable)


def beside_the_sum(gram: Tensor, *, capturable: bool) -> Solution:
    sides = torch.full_like(gram[:1], 0.5)
    part = torch.ones(len(gram) + 1, dtype=torch.bool)
    return combined_min_norm(gram, sides, part, eps=1e-16, capturable=capturable)


SOLVERS: dict[str, Callable[..., Solution]] = {
    "nonnegative_qp": projections,
    "min_norm": min_norm,
    "cagrad_point": cagrad,
    "cagrad_point_c0": without_ball,
    "nash_point": nash_point,
    "nash_point_alpha2": fair,
    "simplex_lp": sum_falls,
    "ray_descent": onto_diagonal,
    "combined_min_norm": beside_the_sum,
}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class NoReadBack(TorchDispatchMode):
    """Raise on an operation whose result the host, or the shape of a tensor, would depend on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name.rstrip("_") in READS or name in READS or by_mask:
            raise AssertionError(f"{func} reads back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("m", [2, 3, 8, 40])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_same_as_on_the_host(solver: str, family: str, m: int) -> None:
    gram = draw(family, m) @ draw(family, m).T
    host, device = (SOLVERS[solver](gram, capturable=flag) for flag in (False, True))
    assert host.converged
    assert device.converged
    scale = host.value.abs().max().item()
    torch.testing.assert_close(device.value, host.value, rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("name", [*GOLDEN, *EDGES])
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_is_read_back_and_nothing_changed(solver: str, name: str) -> None:
    jac = rows({**GOLDEN, **EDGES}[name])
    gram = jac @ jac.T
    before = gram.clone()
    with NoReadBack():
        solution = SOLVERS[solver](gram, capturable=True)
    host = SOLVERS[solver](gram, capturable=False)
    assert torch.equal(gram, before)
    assert solution.value.isfinite().all()
    assert solution.converged == host.converged
    assert (solution.value.shape, solution.residual.shape) == (host.value.shape, torch.Size())
    assert (solution.value.dtype, solution.converged.dtype) == (torch.float64, torch.bool)
    assert (host.value.dtype, host.residual.dtype, host.converged.dtype) == (
        torch.float64,
        torch.float64,
        torch.bool,
    )


@pytest.mark.parametrize(
    "m", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_operation_depends_on_data(solver: str, m: int) -> None:
    with FakeTensorMode():
        gram = torch.empty(m, m, dtype=torch.float64)
        assert SOLVERS[solver](gram, capturable=True).value.shape[-1] == m
