"""A trunk that is adapted to each task: low-rank updates, bottlenecks, FiLM, norms, attention."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from arch_zoo.encoders import Encoder, module_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.layout import axis_of, width_of
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.tensors import channels_back, channels_first


class Context:
    """The tasks of the pass that is running."""

    def __init__(self) -> None:
        self.tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Attachment:
    """What is put at a module of the trunk.

    Args:
        make: Makes the module of one task.
        place: ``"beside"`` adds what it makes of the input to the output, ``"after"`` replaces the
            output by what it makes of it, ``"instead"`` replaces the module.
        shared: A module beside it that serves all tasks, or None.
    """

    make: Callable[[], nn.Module]
    place: str
    shared: nn.Module | None = None


Rule: TypeAlias = Callable[[str, nn.Module], Attachment | None]


class Conditional(nn.Module):
    """A module of the trunk with a module of each task.

    The first axis of its input holds the examples of all tasks of the pass, one task after another.

    Args:
        base: The module of the trunk.
        attachment: What is put there.
        tasks: All tasks.
        context: Says which tasks the pass is for.
    """

    def __init__(
        self, base: nn.Module, attachment: Attachment, tasks: Sequence[str], context: Context
    ) -> None:
        super().__init__()
        self.place = attachment.place
        self.base = base
        self.shared = attachment.shared
        self.specific = nn.ModuleDict({name: attachment.make() for name in tasks})
        self.context = context

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("weight", "bias"):
                raise AttributeError(
                    f"Adapted: `{name}` of a layer is read by a module that does not call the "
                    "layer, so nothing can be attached to it. Leave it out by `names`."
                ) from None
            raise

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tasks = self.context.tasks
        if tasks is None:
            raise RuntimeError(
                "Adapted: a layer with modules of tasks must run within a call of its model, and "
                "was called alone. Call the model, and recompute no part of it in a checkpoint."
            )
        if self.place == "instead":
            return self._each(tasks, x)
        y = self.base(x, *args, **kwargs)
        if self.place == "after":
            return self._each(tasks, y)
        if self.shared is not None:
            y = y + self.shared(x)
        return y + self._each(tasks, x)

    def _each(self, tasks: tuple[str, ...], x: Tensor) -> Tensor:
        pieces = x.chunk(len(tasks))
        return torch.cat([self.specific[t](piece) for t, piece in zip(tasks, pieces, strict=True)])


class Adapted(MultiTaskModel):
    """A trunk with small modules of each task.

    Private modules sit within the trunk, so every task needs features of its own. They come from
    one pass of the trunk in which the batch is repeated for each task along the first axis, which
    modules of the trunk have to keep the first; or from a pass per task. In one pass, autograd
    finds a path from each task to the modules of the others, with a gradient of zero; so by default
    passes that need gradients go task by task, and the others are one.

    The trunk is copied, and frozen unless told otherwise; the norms of a frozen trunk keep their
    statistics. Frozen parameters are neither shared nor of a task.

    Args:
        encoder: The trunk, such as a pretrained network.
        heads: One module per task, which reads the trunk's output.
        rules: What to attach where: :func:`lora`, :func:`bottleneck`, :func:`film`,
            :func:`norm_per_task`, :func:`squeeze_excite`, or functions from a module's path and the
            module to an :class:`Attachment` or None. The first that attaches something counts, and
            what lies within that module is left alone, as is all within ``nn.MultiheadAttention``.
        freeze: Freeze the trunk.
        train: Pattern, as in :mod:`re`, of the trunk's parameters that learn nevertheless.
        batched: Run all tasks in one pass: True always, False never, None where no gradients are
            wanted and the batch holds tensors alone. The task sets of the model are those of passes
            task by task.

    Raises:
        TypeError: If the trunk is no encoder.
        ValueError: If the rules attach nothing.

    Source:
        Houlsby et al., ICML 2019 (bottlenecks); Hu et al., LoRA, ICLR 2022; Agiza et al., MTLoRA,
        CVPR 2024, whose low-rank updates of all tasks and of each these are, whereas its trunk
        reads the shared features alone; Perez et al., FiLM, AAAI 2018; Maninis et al., CVPR 2019.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> heads = {"depth": nn.Linear(8, 1), "normal": nn.Linear(8, 3)}
        >>> model = Adapted(trunk, heads, [lora(rank=2)])
        >>> sum(p.numel() for p in model.task_parameters("depth"))  # (4 + 8 + 8 + 8) * 2 + 9
        65
        >>> list(model.shared_parameters())
        []
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: Heads,
        rules: Sequence[Rule],
        *,
        freeze: bool = True,
        train: str | None = None,
        batched: bool | None = None,
    ) -> None:
        super().__init__(heads)
        self.encoder = copy.deepcopy(module_of(self._owner, "encoder", encoder))
        self.freeze, self.batched = freeze, batched
        if freeze:
            pattern = None if train is None else re.compile(train)
            for name, parameter in self.encoder.named_parameters():
                parameter.requires_grad_(pattern is not None and bool(pattern.search(name)))
        self._context = Context()
        self.encoder = self._attached(self.encoder, rules)
        if not any(True for _ in self._conditionals()):
            raise ValueError("Adapted: `rules` must attach something to the encoder, got nothing.")

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def reach(self) -> Reach:
        private = [pair for layer in self._conditionals() for pair in layer.specific.items()]
        yield from ((module, (name,)) for name, module in private)
        yield from self._all_but(self.encoder, [module for _, module in private])

    def receivers(self) -> Iterator[nn.Module]:
        yield self.encoder

    def train(self, mode: bool = True) -> "Adapted":
        super().train(mode)
        for module in self.encoder.modules() if self.freeze else ():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in own):
                module.eval()
        return self

    def _encode(self, streams: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        together = not torch.is_grad_enabled() if self.batched is None else self.batched
        plain = (Tensor, int, float, str, type(None))
        others = [leaf for leaf in pytree.tree_leaves((x, named)) if not isinstance(leaf, plain)]
        if others and self.batched:
            raise ValueError(
                "Adapted: `batched` must be None or False for a batch that holds more than tensors,"
                f" which cannot be repeated, got {type(others[0]).__name__}."
            )
        together = together and not others
        passes = [streams] if together else [(name,) for name in streams]
        per_task: dict[str, Any] = {}
        for names in passes:
            per_task |= self._passed(names, x, named)
        return Features(shared=(), per_task=per_task, aux={})

    def _passed(
        self, streams: tuple[str, ...], x: Inputs, named: Mapping[str, Inputs]
    ) -> dict[str, Any]:
        """Return what one pass of the trunk makes for some tasks."""
        n = len(streams)

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(n, *[1] * (value.ndim - 1)) if value.ndim else value

        x, named = pytree.tree_map_only(Tensor, repeated, (x, dict(named)))
        self._context.tasks = streams
        try:
            z = call(self.encoder, x, named)
        finally:
            self._context.tasks = None
        leaves, spec = pytree.tree_flatten(z)
        pieces = [leaf.chunk(n) if isinstance(leaf, Tensor) else [leaf] * n for leaf in leaves]
        return {
            name: pytree.tree_unflatten([piece[i] for piece in pieces], spec)
            for i, name in enumerate(streams)
        }

    def _conditionals(self) -> Iterator[Conditional]:
        return (m for m in self.encoder.modules() if isinstance(m, Conditional))

    def _attached(self, module: nn.Module, rules: Sequence[Rule], path: str = "") -> nn.Module:
        """Return a module with what the rules attach to it, or within it."""
        for rule in rules:
            attachment = rule(path, module)
            if attachment is not None:
                return Conditional(module, attachment, self.streams, self._context)
        if isinstance(module, nn.MultiheadAttention):
            return module  # it reads the weights of its parts without calling them
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            setattr(module, name, self._attached(child, rules, below))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused kernel, which would do likewise
        return module


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    *,
    names: str = "",
    shared_rank: int = 0,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> Rule:
    r"""Low-rank updates of linear layers and convolutions.

    A layer becomes :math:`W x + \tfrac{\alpha}{r} B_t A_t x`. `B` starts at zero, so the start is
    that of the trunk.

    Args:
        rank: Rank `r` of each task's update.
        alpha: Numerator of its scale.
        names: Pattern, as in :mod:`re`, of the paths of layers; by default all.
        shared_rank: Rank of a further update that serves all tasks; 0 for none.
        kinds: Classes of layers. Convolutions in groups are left out.

    Raises:
        ValueError: If a rank is out of range.
    """
    if rank < 1 or shared_rank < 0:
        raise ValueError(
            f"lora: `rank` must be >= 1 and `shared_rank` >= 0, got {rank} and {shared_rank}."
        )
    pattern = re.compile(names)

    def rule(path: str, module: nn.Module) -> Attachment | None:
        if not isinstance(module, kinds) or not pattern.search(path):
            return None
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            return None
        shared = LowRank(module, shared_rank, alpha) if shared_rank else None
        return Attachment(lambda: LowRank(module, rank, alpha), "beside", shared)

    return rule


class LowRank(nn.Module):
    """A low-rank update of a linear layer or convolution.

    Args:
        layer: Whose sizes it has.
        rank: Its rank.
        alpha: Its scale times the rank.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                layer.in_channels,
                rank,
                _pair(layer.kernel_size),
                _pair(layer.stride),
                layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
                _pair(layer.dilation),
                bias=False,
                padding_mode=layer.padding_mode,
            )
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        elif isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            raise ValueError(
                f"lora: `kinds` must be linear layers or convolutions, got {type(layer).__name__}."
            )
        nn.init.zeros_(self.up.weight)
        self.scale = alpha / rank
        self.to(next(layer.parameters()).device, next(layer.parameters()).dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.up(self.down(x))
        return y


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return (sizes[0], sizes[1])


def bottleneck(
    names: str, reduction: int = 16, act: Callable[[Tensor], Tensor] = functional.gelu
) -> Rule:
    r"""Residual bottlenecks after modules, :math:`h + U \operatorname{act}(D h + d) + u`.

    `U` and `u` start at zero, so the start is that of the trunk.

    Args:
        names: Pattern, as in :mod:`re` and to be matched in full, of the paths of modules.
        reduction: Channels over hidden ones.
        act: Between both layers.

    Raises:
        ValueError: If a module has no layer whose width is known.
    """
    return _after(names, lambda module: Bottleneck(module, reduction, act))


def film(names: str) -> Rule:
    r"""Scale and shift of each channel after modules, :math:`(1 + g_t) \odot h + b_t`.

    Both start at zero, so the start is that of the trunk.

    Args:
        names: Pattern, as in :mod:`re` and to be matched in full, of the paths of modules.

    Raises:
        ValueError: If a module has no layer whose width is known.
    """
    return _after(names, FiLM)


def squeeze_excite(names: str, reduction: int = 16) -> Rule:
    r"""Factors for channels after modules, read off the means of these.

    They are :math:`2 \sigma(W_2 \operatorname{relu}(W_1 \bar h))`. `W_2` and its bias start at
    zero, so all factors start at 1; the published ones start near 1 where their gradient is almost
    zero.

    Args:
        names: Pattern, as in :mod:`re` and to be matched in full, of the paths of modules.
        reduction: Channels over hidden ones.

    Raises:
        ValueError: If a module has no layer whose width is known.
    """
    return _after(names, lambda module: SqueezeExcite(module, reduction))


def norm_per_task(names: str = "", kinds: tuple[type[nn.Module], ...] = (_BatchNorm,)) -> Rule:
    """Norms of each task in place of shared ones, statistics included, which start as copies.

    Args:
        names: Pattern, as in :mod:`re`, of the paths of norms; by default all.
        kinds: Classes of norms.
    """
    pattern = re.compile(names)

    def rule(path: str, module: nn.Module) -> Attachment | None:
        if not isinstance(module, kinds) or not pattern.search(path):
            return None
        return Attachment(lambda: copy.deepcopy(module).requires_grad_(True), "instead")

    return rule


def _after(names: str, make: Callable[[nn.Module], nn.Module]) -> Rule:
    pattern = re.compile(names)

    def rule(path: str, module: nn.Module) -> Attachment | None:
        return Attachment(lambda: make(module), "after") if pattern.fullmatch(path) else None

    return rule


class _OnChannels(nn.Module):
    """The base of modules that look at the channels of what a module returns.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.width = width_of(module)
        if self.width is None:
            raise ValueError(
                "Adapted: `names` must match modules with a layer of known width, got "
                f"{type(module).__name__}."
            )
        self.channels = self.width.channels

    def first(self, x: Tensor) -> tuple[Tensor, int]:
        """Return features with channels second, and where they were."""
        axis = axis_of("Adapted", "a module", x, None, self.width)
        return channels_first(x, axis), axis


class Bottleneck(_OnChannels):
    """A residual bottleneck over single positions, see :func:`bottleneck`."""

    def __init__(self, module: nn.Module, reduction: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__(module)
        hidden = max(1, self.channels // reduction)
        self.down = nn.Linear(self.channels, hidden)
        self.up = nn.Linear(hidden, self.channels)
        self.act = act
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        z, axis = self.first(x)
        z = z.movedim(1, -1)
        z = z + self.up(self.act(self.down(z)))
        return channels_back(z.movedim(-1, 1), axis)


class FiLM(_OnChannels):
    """A scale and a shift per channel, see :func:`film`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.scale = nn.Parameter(torch.zeros(self.channels))
        self.shift = nn.Parameter(torch.zeros(self.channels))

    def forward(self, x: Tensor) -> Tensor:
        z, axis = self.first(x)
        shape = [-1, *[1] * (z.ndim - 2)]
        return channels_back((1 + self.scale.view(shape)) * z + self.shift.view(shape), axis)


class SqueezeExcite(_OnChannels):
    """Factors for channels, read off their means, see :func:`squeeze_excite`."""

    def __init__(self, module: nn.Module, reduction: int) -> None:
        super().__init__(module)
        hidden = max(1, self.channels // reduction)
        self.squeeze = nn.Linear(self.channels, hidden)
        self.excite = nn.Linear(hidden, self.channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        z, axis = self.first(x)
        mean = z.flatten(2).mean(2) if z.ndim > 2 else z
        factors = 2 * torch.sigmoid(self.excite(torch.relu(self.squeeze(mean))))
        return channels_back(factors.view(*factors.shape, *[1] * (z.ndim - 2)) * z, axis)
