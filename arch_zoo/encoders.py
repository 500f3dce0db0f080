"""One way to take an encoder: a module, a list of stages, or a function that makes either."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

from torch import nn

from arch_zoo.inputs import call, joint

Encoder: TypeAlias = nn.Module | Sequence["Encoder"] | Callable[[], "Encoder"]
Factory: TypeAlias = Callable[[], Encoder]


class Chain(nn.Sequential):
    """Modules one after the other, each with those named inputs that its ``forward`` names."""

    @property
    def takes(self) -> frozenset[str] | None:
        """Names of inputs that some of the modules take."""
        return joint(parts_of(self))

    # a superset of what Sequential takes, whose argument has another name
    def forward(self, x: Any = None, **named: Any) -> Any:  # type: ignore[override]
        for module in parts_of(self):
            x = call(module, x, named)
        return x


def module_of(owner: str, argument: str, encoder: Encoder) -> nn.Module:
    """Return the encoder as one module, calling it if it is a factory, joining it if a list.

    Raises:
        TypeError: If it is none of the three.
    """
    made = _make(owner, argument, encoder)
    return made if isinstance(made, nn.Module) else Chain(*made)


def stages_of(
    owner: str, argument: str, encoder: Encoder, several: bool = False
) -> list[nn.Module]:
    """Return the stages of an encoder; a module that is no plain container is a single stage.

    Args:
        owner: Who asks, for the error.
        argument: What is asked for.
        encoder: The encoder.
        several: Refuse a network that is given as one module.

    Raises:
        TypeError: If it is neither a module, nor a list of stages, nor a factory of those.
        ValueError: If it is a network in one piece where several stages are asked for.
    """
    made = _make(owner, argument, encoder)
    if isinstance(made, nn.Sequential) and type(made).forward in CHAINED:
        return list(made)
    if not isinstance(made, nn.Module):
        return made
    if several and next(made.children(), None) is not None:
        raise ValueError(
            f"{owner}: `{argument}` must be several stages, got {type(made).__name__} in one "
            "piece. Pass `arch_zoo.stages(backbone).parts`, or a list of its stages; a list of one "
            "keeps it whole."
        )
    return [made]


def copies_of(
    owner: str, argument: str, encoder: Encoder, n: int, several: bool = False
) -> list[list[nn.Module]]:
    """Return the stages of ``n`` encoders that share no parameter.

    Factories are called ``n`` times; modules are copied and so start alike, as pretrained ones do.
    """
    return [stages_of(owner, argument, _copy(encoder, {}), several) for _ in range(n)]


def parts_of(container: nn.Module) -> list[nn.Module]:
    """Return the submodules, each as often as it stands there, where `children` says it once."""
    return [module for module in container._modules.values() if module is not None]


CHAINED = (nn.Sequential.forward, Chain.forward)  # of containers that are no more than their parts


def _copy(encoder: Encoder, memo: dict[int, object]) -> Encoder:
    """Copy the modules and leave the factories, which may count their calls."""
    if isinstance(encoder, Sequence):
        return [_copy(part, memo) for part in encoder]
    return deepcopy(encoder, memo) if isinstance(encoder, nn.Module) else encoder


def _make(owner: str, argument: str, encoder: Encoder) -> nn.Module | list[nn.Module]:
    made = encoder
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    if isinstance(made, nn.Module) and not isinstance(made, nn.ModuleList):
        return made
    if isinstance(made, Sequence | nn.ModuleList) and len(made) and not isinstance(made, str):
        return [module_of(owner, argument, part) for part in made]
    raise TypeError(
        f"{owner}: `{argument}` must be a module, a list of stages, or a function without "
        f"arguments that makes one, got {made!r}."
    )
