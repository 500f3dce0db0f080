"""Banks of experts, run one by one or all at once."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from arch_zoo.encoders import CHAINED, Factory, module_of, parts_of
from arch_zoo.inputs import call, joint, taken_by
from arch_zoo.tensors import stack

ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Dropout,
)  # fmt: skip


class ExpertBank(nn.Module):
    """Experts that all read the same input.

    The backends compute the same. ``loop`` calls modules of any kind one after the other; ``bmm``
    runs multilayer perceptrons layer by layer as batched products; ``vmap`` maps one expert over
    stacked parameters, in their precision even under autocast. The latter two hold one tensor per
    parameter, with a leading axis for the experts, stacked after each expert was initialised; what
    works tensor by tensor sees the experts as one.

    Args:
        experts: A factory, called once per expert, or the list of experts.
        n: Number of experts; may be left out with a list.
        backend: ``"loop"``, ``"bmm"``, ``"vmap"``, or ``"auto"``: ``bmm`` for perceptrons of
            linear and elementwise layers, ``loop`` for the rest.

    Raises:
        TypeError: If the experts are one module, whose copies would never grow apart.
        ValueError: If there is none, the number disagrees, or the backend cannot run them.

    Example:
        >>> bank = ExpertBank(lambda: nn.Linear(4, 8), 3)
        >>> bank.backend, tuple(bank(torch.zeros(5, 4)).shape)
        ('bmm', (5, 3, 8))
    """

    def __init__(
        self,
        experts: Factory | Sequence[nn.Module],
        n: int | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        modules = _made(experts, n)
        suits = {
            "loop": True,
            "bmm": _stackable(modules) and _layers(modules[0]) is not None,
            "vmap": _stackable(modules),
        }
        if backend == "auto":
            backend = "bmm" if suits["bmm"] else "loop"
        if backend not in suits:
            raise ValueError(
                "ExpertBank: `backend` must be one of 'auto', 'loop', 'bmm', 'vmap', "
                f"got {backend!r}."
            )
        if not suits[backend]:
            kind = "perceptrons" if backend == "bmm" else "modules with parameters"
            raise ValueError(
                f"ExpertBank: `experts` must be {kind} of one build for backend {backend!r}, got "
                f"{[type(module).__name__ for module in modules]}. Use 'loop'."
            )
        self.n = len(modules)
        self.backend = backend
        self.experts = nn.ModuleList(modules) if backend == "loop" else _stacked(modules)

    @property
    def takes(self) -> frozenset[str] | None:
        """Names of inputs that some expert takes."""
        return joint(parts_of(self.experts) if self.backend == "loop" else [self.experts])

    @property
    def starts_equal(self) -> bool:
        """Whether all experts hold the same numbers now, as copies of a pretrained one do."""
        tensors = [_state(module) for module in self.to_modules()] if self.n > 1 else []
        known = [v for state in tensors for v in state.values()]
        if not known or any(is_lazy(value) or value.is_meta for value in known):
            return False
        first = tensors[0]
        return all(
            other.keys() == first.keys() and all(_equal(other[k], first[k]) for k in first)
            for other in tensors[1:]
        )

    def forward(self, x: Any = None, **named: Any) -> Any:
        """Return the outputs of all experts, shape ``[batch, n, ...]``; structures leaf by leaf.

        Args:
            x: What all experts read.
            named: Inputs by name, for experts whose ``forward`` names them.

        Raises:
            ValueError: If their shapes disagree.
        """
        return RUNS[self.backend](self.experts, x, self.n, named)

    def to_modules(self) -> list[nn.Module]:
        """Return the experts as modules of their own, copied; the way to another backend."""
        if isinstance(self.experts, nn.ModuleList):
            return list(deepcopy(self.experts))
        modules = [deepcopy(self.experts) for _ in range(self.n)]
        for index, module in enumerate(modules):
            for name, value in _state(module).items():
                _assign(module, name, value, value.detach()[index].clone())
        return modules


def _loop(experts: nn.Module, x: Any, n: int, named: dict[str, Any]) -> Any:
    outputs = {f"expert {i}": call(e, x, named) for i, e in enumerate(parts_of(experts))}
    return stack("ExpertBank", "the outputs of all experts", outputs)


def _bmm(experts: nn.Module, x: Tensor, n: int, named: dict[str, Any]) -> Tensor:
    h = x.reshape(-1, x.shape[-1]).expand(n, -1, -1)
    for layer in _layers(experts) or ():
        if not isinstance(layer, nn.Linear):
            h = layer(h)
        elif layer.bias is None:
            h = torch.bmm(h, layer.weight.mT)
        else:
            h = torch.baddbmm(layer.bias.unsqueeze(1), h, layer.weight.mT)
    return h.reshape(n, *x.shape[:-1], -1).transpose(0, 1)


def _vmap(experts: nn.Module, x: Tensor, n: int, named: dict[str, Any]) -> Any:
    state = _state(experts)
    taken = taken_by(experts, named)

    def run(state: dict[str, Tensor]) -> Any:
        return functional_call(experts, state, (x,), taken)

    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point():
        x = x.to(next(experts.parameters()).dtype)
    with torch.autocast(kind, enabled=False):  # autocast misses convolutions inside vmap
        if torch.compiler.is_exporting():  # which does not see through vmap
            singles = [run({name: v[i] for name, v in state.items()}) for i in range(n)]
            outputs = {f"expert {i}": single for i, single in enumerate(singles)}
            return stack("ExpertBank", "the outputs of all experts", outputs)
        return torch.vmap(run, out_dims=1, randomness="different")(state)


RUNS: dict[str, Callable[[nn.Module, Any, int, dict[str, Any]], Any]] = {
    "loop": _loop,
    "bmm": _bmm,
    "vmap": _vmap,
}


def _made(experts: Factory | Sequence[nn.Module], n: int | None) -> list[nn.Module]:
    if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList):
        raise TypeError(
            "ExpertBank: `experts` must be a factory or a list of modules, got "
            f"{type(experts).__name__}. Pass a function that makes a new expert at each call, "
            "because copies of one module never grow apart."
        )
    if n is None and isinstance(experts, Sequence | nn.ModuleList):
        n = len(experts)
    if n is None or n < 1:
        raise ValueError(f"ExpertBank: `n` must be >= 1, got {n!r}.")
    if isinstance(experts, Sequence | nn.ModuleList):
        if len(experts) != n:
            raise ValueError(f"ExpertBank: `experts` must hold `n` = {n}, got {len(experts)}.")
        return [module_of("ExpertBank", "experts", expert) for expert in experts]
    return [module_of("ExpertBank", "experts", experts) for _ in range(n)]


def _layers(module: nn.Module) -> list[nn.Module] | None:
    """Return the layers of a perceptron, or None for any other module."""
    if type(module) is nn.Linear or type(module) in ELEMENTWISE:
        return [module]
    if not isinstance(module, nn.Sequential) or type(module).forward not in CHAINED:
        return None
    parts = [_layers(child) for child in module]
    return None if None in parts else [layer for part in parts for layer in part or ()]


def _stackable(modules: list[nn.Module]) -> bool:
    """Tell whether all have one build, with parameters of known shapes, none of them tied."""
    if any(is_lazy(value) for module in modules for value in _state(module).values()):
        return False
    builds = {
        (repr(module), tuple((k, v.shape, v.dtype) for k, v in _state(module).items()))
        for module in modules
    }
    every = list(modules[0].parameters())
    tied = len(every) < len(list(modules[0].named_parameters(remove_duplicate=False)))
    return len(builds) == 1 and len(every) > 0 and not tied


def _stacked(modules: list[nn.Module]) -> nn.Module:
    """Return a copy of the first module that holds the tensors of all, stacked."""
    states = [_state(module) for module in modules]
    result = deepcopy(modules[0])
    for name, value in states[0].items():
        _assign(result, name, value, torch.stack([state[name].detach() for state in states]))
    return result


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _assign(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Set the tensor of this name, as a parameter if the old one is."""
    path, _, leaf = name.rpartition(".")
    is_parameter = isinstance(old, nn.Parameter)
    value = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
    setattr(module.get_submodule(path), leaf, value)
