"""One way to take an encoder: a module, a list of stages, or a function that makes either."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TypeAlias

from torch import nn

Encoder: TypeAlias = nn.Module | Sequence["Encoder"] | Callable[[], "Encoder"]
Factory: TypeAlias = Callable[[], Encoder]


def module_of(owner: str, argument: str, encoder: Encoder) -> nn.Module:
    """Return the encoder as one module, calling it if it is a factory, joining it if a list.

    Raises:
        TypeError: If it is none of the three.
    """
    made = _make(owner, argument, encoder)
    return made if isinstance(made, nn.Module) else nn.Sequential(*made)


def stages_of(owner: str, argument: str, encoder: Encoder) -> list[nn.Module]:
    """Return the stages of an encoder; a module that is no plain container is a single stage.

    Raises:
        TypeError: If it is neither a module, nor a list of stages, nor a factory of those.
    """
    made = _make(owner, argument, encoder)
    if isinstance(made, nn.Sequential) and type(made).forward is nn.Sequential.forward:
        return list(made)
    return [made] if isinstance(made, nn.Module) else made


def copies_of(owner: str, argument: str, encoder: Encoder, n: int) -> list[list[nn.Module]]:
    """Return the stages of ``n`` encoders that share no parameter.

    Factories are called ``n`` times; modules are copied and so start alike, as pretrained ones do.
    """
    return [stages_of(owner, argument, _copy(encoder, {})) for _ in range(n)]


def parts_of(container: nn.Module) -> list[nn.Module]:
    """Return the submodules, each as often as it stands there, where `children` says it once."""
    return [module for module in container._modules.values() if module is not None]


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
