"""Toy models with several losses, and slow, obvious references for what is made of them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradbal import MTLOptimizer, aggregate, engines, make_rule
from gradbal.rules._base import Context, GramRule

Row = list[Tensor | None]
PUBLISHED = {  # learned scales as in the papers: from 0 on, stepped as the model is
    name: make_rule(name, init=0.0, learner="base") for name in ("uw", "imtl_l", "imtl")
}


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter seeded values, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw / max(1, parameter[0].numel() if parameter.ndim > 1 else 1) ** 0.5)
    return module


def chooser(seed: int) -> Callable[[int, int], list[int]]:
    """Return what draws so many numbers below a limit."""
    generator = torch.Generator().manual_seed(seed)
    return lambda limit, count: torch.randint(limit, (count,), generator=generator).tolist()


def param(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(data(*shape, seed=seed))


def square(y: Tensor) -> Tensor:
    return y.square().mean()


class Toy(nn.Module):
    """A trunk of two layers with one head per task."""

    def __init__(self, n_tasks: int = 3, width: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(n_tasks))
        fill(self, seed)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x).tanh()
        return [head(z) for head in self.heads]

    def losses(self, batch: int = 0, rows: slice = slice(None)) -> list[Tensor]:
        """Mean squared errors on a batch of six, or on some of its rows."""
        x = data(6, 4, seed=100 + batch)[rows]
        targets = [data(6, 2, seed=200 + 10 * batch + i)[rows] for i in range(len(self.heads))]
        return [(y - t).square().mean() for y, t in zip(self(x), targets, strict=True)]

    def named(self, batch: int = 0) -> dict[str, Tensor]:
        return dict(zip("abcdefgh", self.losses(batch), strict=False))


def wrapped(
    module: nn.Module | Iterable[Tensor], rule: Any = "upgrad", lr: float = 0.1, **options: Any
) -> MTLOptimizer:
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    return MTLOptimizer(torch.optim.SGD(parameters, lr=lr), rule, **options)


# ---------------------------------------------------------------------- references


def dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def lone_rows(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Row]:
    """Differentiate every loss by itself, for every parameter that requires a gradient."""
    rows: list[Row] = []
    live = [p for p in params if p.requires_grad]
    for loss in losses:
        if not loss.requires_grad:
            rows.append([None] * len(params))
            continue
        grads = torch.autograd.grad(
            loss, live, torch.ones_like(loss), retain_graph=True, allow_unused=True
        )
        found = {id(p): g for p, g in zip(live, grads, strict=True)}
        rows.append([found.get(id(p)) for p in params])
    return rows


def shared_positions(rows: Sequence[Row]) -> list[int]:
    """Return the parameters that several rows reach."""
    return [i for i, column in enumerate(zip(*rows, strict=True)) if reaching(column) > 1]


def reaching(column: Iterable[Tensor | None]) -> int:
    return sum(grad is not None for grad in column)


def jacobian(rows: Sequence[Row], params: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """Lay the rows out as one matrix over the parameters at these positions."""

    def flat(row: Row) -> Tensor:
        parts = [
            torch.zeros_like(params[i]) if (grad := row[i]) is None else dense(grad)
            for i in positions
        ]
        return torch.cat([part.reshape(-1) for part in parts]).detach()

    return torch.stack([flat(row) for row in rows])


def scaled(rule: Any, n_tasks: int) -> int:
    """Say what ``scale="sum"`` multiplies a rule's direction by."""
    return n_tasks if make_rule(rule).scale == "mean" else 1


def expected_grads(
    losses: Sequence[Tensor], params: Sequence[Tensor], rule: Any, *, scale: str = "sum"
) -> list[Tensor | None]:
    """Make what ``.grad`` must hold, from lone passes and ``aggregate`` on the whole Jacobian.

    For rules with plain heads, or whose weights are all 1.
    """
    rows = lone_rows(losses, params)
    positions = shared_positions(rows)
    own = [sum_or_none(column) for column in zip(*rows, strict=True)]
    if not positions:
        return own
    members = [k for k, row in enumerate(rows) if any(row[i] is not None for i in positions)]
    matrix = jacobian([rows[k] for k in members], params, positions)
    values = [float(losses[k].detach()) for k in members]
    if not matrix.numel():
        return own
    direction = aggregate(matrix, rule, losses=values).direction
    direction = direction * (scaled(rule, len(members)) if scale == "sum" else 1)
    pieces = direction.split([params[i].numel() for i in positions])
    for i, piece in zip(positions, pieces, strict=True):
        own[i] = piece.view(params[i].shape)
    return own


def sum_or_none(column: Iterable[Tensor | None]) -> Tensor | None:
    some = [dense(grad) for grad in column if grad is not None]
    return torch.stack(some).sum(dim=0) if some else None


def assert_same(
    found: Iterable[Tensor | None], wanted: Iterable[Tensor | None], tol: float = 1e-10
) -> None:
    """Compare tensors, or None, relative to the largest entry of all that is wanted."""
    found, wanted = (
        [None if grad is None else dense(grad.detach()).double() for grad in grads]
        for grads in (found, wanted)
    )
    sizes = [float(w.abs().max()) for w in wanted if w is not None and w.numel()]
    limit = tol * max([*sizes, 1e-30])
    assert [f is None for f in found] == [w is None for w in wanted]
    for f, w in zip(found, wanted, strict=True):
        if f is not None and w is not None and w.numel():
            assert f.shape == w.shape
            assert float((f - w).abs().max()) <= limit


def grads(params: nn.Module | Iterable[Tensor]) -> list[Tensor | None]:
    """Copy what ``.grad`` holds."""
    params = params.parameters() if isinstance(params, nn.Module) else params
    return [None if p.grad is None else p.grad.clone() for p in params]


def frozen_copy(tree: Any) -> Any:
    """Copy a tree of dicts, lists and tensors, tensors as bytes that compare bit for bit."""
    if isinstance(tree, Tensor):
        flat = tree.detach().to_dense().contiguous().reshape(-1)
        return (
            tree.dtype,
            tuple(tree.shape),
            flat.view(torch.uint8).numpy().tobytes() if len(flat) else b"",
        )
    if isinstance(tree, Mapping):
        return {key: frozen_copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [frozen_copy(value) for value in tree]
    return tree


def everything(module: nn.Module, optimizer: Any) -> Any:
    """Copy parameters, buffers, gradients and all state, to be compared bit for bit."""
    return frozen_copy(
        [dict(module.state_dict()), grads(module), optimizer.state_dict(), optimizer.core.skipped]
    )


def says(error: type[Exception], sentence: str, call: Callable[[], Any]) -> None:
    """Check the whole message, from its first to its last character."""
    with pytest.raises(error, match=f"^{re.escape(sentence)}$") as caught:
        call()
    text = str(caught.value)
    assert text[0].isupper() or text.split(":")[0].islower()
    assert text.endswith(".")


@dataclass(frozen=True)
class Pick(GramRule):
    """Weight 1 for one task and 0 for the others: shows the row of that task in ``.grad``."""

    task: int = 0

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        out = torch.zeros_like(gram[0])
        out[self.task] = 1
        return out


@dataclass(frozen=True)
class Fixed(GramRule):
    """Given weights; counts nothing, keeps nothing."""

    values: tuple[float, ...]

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        return gram.new_tensor(self.values)


@dataclass(frozen=True)
class Inverse(GramRule):
    """Weights that depend on the Gram matrix smoothly: one over the norms."""

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        return 1 / (1 + gram.diagonal().sqrt())


class Deep(nn.Module):
    """A trunk of equal layers with skips, so that some places to cut are wide and some narrow."""

    def __init__(self, depth: int, width: int = 8, n_tasks: int = 3, batch: int = 2) -> None:
        super().__init__()
        self.batch = batch
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * depth))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(n_tasks))
        with torch.no_grad():
            for i, parameter in enumerate(self.double().parameters()):
                parameter.copy_(data(*parameter.shape, seed=i) / width**0.5)

    def losses(self) -> list[Tensor]:
        z = data(self.batch, self.layers[0].in_features).to(self.layers[0].weight)
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            z = z + second(first(z).tanh())
        return [square(head(z) - k) for k, head in enumerate(self.heads)]


class Counted:
    """Count how often gradients pass a tensor."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        self.counts.setdefault(name, 0)

        def passed(grad: Tensor) -> None:
            self.counts[name] += 1

        tensor.register_hook(passed)
        return tensor


def same_as_sequential(
    params: Sequence[Tensor],
    losses: Callable[[], list[Tensor]],
    engine: object,
    tol: float = 1e-10,
    **options: Any,
) -> None:
    """Compare Gram matrices and gradients, and let ``check`` compare the rows."""
    found = []
    for chosen in (engines.Sequential(), engine):
        for p in params:
            p.grad = None
        optimizer = wrapped(params, Inverse(), engine=chosen, heads="plain", **options)
        optimizer.backward(losses())
        assert optimizer.last is not None
        strides = [None if p.grad is None or p.grad.is_sparse else p.grad.stride() for p in params]
        found.append((optimizer.last.grams, grads(params), strides))
    (wanted, directions, strides), (grams, ours, own_strides) = found
    assert own_strides == strides
    assert grams.keys() == wanted.keys()
    for group in wanted:
        assert_same([grams[group]], [wanted[group]], tol)
    assert_same(ours, directions, tol)
    for p in params:
        p.grad = None
    if tol <= 1e-5:
        assert max(optimizer.check(losses()).values()) <= tol


# ---------------------------------------------------------------------- what a step does


aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.linalg_eigh.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten.unique_dim.default,
    aten._unique2.default,
}


class NothingRead(TorchDispatchMode):
    """Raise where a value comes back to the host, or a shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise AssertionError(f"{func} reads back")
        if func is aten.index.Tensor:
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8)
        return func(*args, **(kwargs or {}))


VIEWS = {"as_strided", "detach", "slice", "t", "view", "alias", "unbind", "permute"}


class Dispatched(TorchDispatchMode):
    """Records every operation, and those that touch the storage of some tensor."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()
        self.watched = {tensor.untyped_storage().data_ptr() for tensor in watched}
        self.all: Counter[str] = Counter()
        self.touching: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.all[name] += 1
        if name not in VIEWS and places & self.watched:
            self.touching[name] += 1
        return func(*args, **(kwargs or {}))


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


def spoiled(model: Toy, batch: int, how: str) -> dict[str, Tensor]:
    """Losses of which the second is bad: itself, or only its gradient."""
    losses = model.named(batch)
    losses["b"] = Overflow.apply(losses["b"]) if how == "gradient" else losses["b"] * float(how)
    return losses


def scaler(scale: float = 2.0**16, **options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **options)


def scaled_step(optimizer: MTLOptimizer, losses: Any, scale: GradScaler, **options: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses, scaler=scale, **options)
    scale.step(optimizer)
    scale.update()
