"""MTAN: one trunk, and for each task attention masks over its features."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.blocks import Attention, Bottleneck, Convolution
from arch_zoo.encoders import Chain, Encoder, parts_of, stages_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.layout import axis_of, widths_of
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.tensors import channels_back, channels_first, check_layout

RESIZES = ("auto", "max", "avg", "interp")
POOLS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "max": (
        functional.adaptive_max_pool1d,
        functional.adaptive_max_pool2d,
        functional.adaptive_max_pool3d,
    ),
    "avg": (
        functional.adaptive_avg_pool1d,
        functional.adaptive_avg_pool2d,
        functional.adaptive_avg_pool3d,
    ),
}


class MTAN(MultiTaskModel):
    r"""Multi-task attention network: head `t` reads masked features of the trunk's last stage.

    A stage is a body and a tap, whose outputs are :math:`u_s` and :math:`p_s`. Task `t` looks at
    :math:`u_s` and at what it made of the stage before, and masks :math:`p_s`:

    .. math:: v_t^s = a_t^s([u_s, r_t^{s-1}]) \odot p_s, \qquad r_t^s = R^s(v_t^s)

    Where maps shrink, they are refined and then resized; where they grow, as in the decoder of a
    SegNet, they are resized and then refined. A part of a stage may return a tuple that starts with
    the features, such as a pooling with its indices. The next part is called with that tuple.

    The masks are private, the refinements `R` shared. ``Features.shared`` holds the taps
    :math:`u_1, p_1, \dots` on their way to the tasks: complete for the trunk, whereas the
    refinements lie beyond it. All is sized by the first input, and resized to each :math:`p_s`.

    The refinements' norms are shared as published: in training each task is normalised by its own
    batch, but one set of running statistics serves all in evaluation. Where the tasks' masks differ
    much, that costs accuracy in evaluation only; ``refine=None`` does without.

    Args:
        stages: The trunk. A stage that is a pair, or a sequence of two modules or more, is tapped
            before and after its last module; any other module after it alone.
        heads: One module per task, which reads features shaped as the trunk's.
        reduction: Channels of the trunk over hidden channels of the masks; ``>= 1``.
        refine: ``"residual"``, a bottleneck block; ``"conv"``, a single convolution; or None.
        resize: How features meet a stage's size, one for all or a list with one for each stage:
            ``"max"`` or ``"avg"`` pooling, which shrink only; ``"interp"``, linear; or ``"auto"``,
            max-pooling where maps shrink and linear where they grow. Features that meet vectors are
            averaged.
        layout: Axes of the stages' outputs, such as ``"NHWC"`` or ``"NCL"``; by default derived
            from the last layer of each part.

    Raises:
        TypeError: If the stages are no encoder.
        ValueError: If an option is none of these, the trunk is a network in one piece, or the
            heads cannot be named; in a forward pass, if a stage changes the number of axes other
            than to vectors, a map that grows was to be pooled, or features do not fit the layout.

    Source:
        Liu et al., End-to-End Multi-Task Learning with Attention, CVPR 2019, with the
        refinement of the authors' residual network.

    Example:
        >>> heads = {"depth": nn.Conv2d(16, 1, 1), "normal": nn.Conv2d(16, 3, 1)}
        >>> trunk = [nn.Conv2d(3, 8, 3, padding=1), (nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())]
        >>> model = MTAN(trunk, heads).initialize(torch.zeros(1, 3, 9, 7))
        >>> model(torch.zeros(2, 3, 9, 7))["normal"].shape
        torch.Size([2, 3, 5, 4])
    """

    def __init__(
        self,
        stages: Encoder,
        heads: Heads,
        *,
        reduction: int = 4,
        refine: str | None = "residual",
        resize: str | Sequence[str] = "auto",
        layout: str | None = None,
    ) -> None:
        super().__init__(heads)
        if reduction < 1:
            raise ValueError(f"MTAN: `reduction` must be >= 1, got {reduction}.")
        if refine not in ("residual", "conv", None):
            raise ValueError(f"MTAN: `refine` must be 'residual', 'conv' or None, got {refine!r}.")
        check_layout("MTAN", layout)
        trunk = stages_of(self._owner, "stages", stages, several=len(self.streams) > 1)
        self.resize = [resize] * len(trunk) if isinstance(resize, str) else list(resize)
        if len(self.resize) != len(trunk) or not set(self.resize) <= set(RESIZES):
            raise ValueError(
                "MTAN: `resize` must be 'auto', 'max', 'avg' or 'interp', or one of these for each "
                f"of the {len(trunk)} stages, got {resize!r}."
            )
        self.layout = layout
        self.stages = nn.ModuleList(nn.ModuleList(_split(stage)) for stage in trunk)
        self.widths = widths_of(part for stage in self.stages for part in parts_of(stage))
        self.attention = nn.ModuleDict(
            {t: nn.ModuleList(Attention(reduction) for _ in trunk) for t in self.streams}
        )
        block = Bottleneck if refine == "residual" else Convolution
        self.refine = nn.ModuleList(block() for _ in trunk[1:] if refine is not None)

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def receivers(self) -> Iterator[nn.Module]:
        for stage in self.stages:
            yield from parts_of(stage)

    def reach(self) -> Reach:
        yield self.stages, self.streams
        yield self.refine, self.streams
        for name, masks in self.attention.items():
            yield masks, (name,)

    def _encode(self, streams: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        cut: list[Tensor] = []
        taps: list[Tensor] = []
        axis = 1
        for part, width in zip(self.receivers(), self.widths, strict=True):
            x = call(part, x, named)
            tap = _features(x)
            cut.append(tap.clone())  # no tap has a path to another, or is changed in place
            axis = axis_of("MTAN", f"`stages[{len(taps) // 2}]`", tap, self.layout, width)
            taps.append(channels_first(cut[-1], axis))
        looks = [
            self._fit(s, u, p) for s, (u, p) in enumerate(zip(taps[::2], taps[1::2], strict=True))
        ]
        per_task = {
            name: channels_back(self._attend(name, looks, taps[1::2]), axis) for name in streams
        }
        return Features(shared=tuple(cut), per_task=per_task, aux={})

    def _attend(self, task: str, looks: list[Tensor], taps: list[Tensor]) -> Tensor:
        """Return the masked last tap of a task, channels first."""
        masks = parts_of(self.attention[task])
        seen = looks[0]
        for s, tap in enumerate(taps):
            masked: Tensor = masks[s](seen, tap.shape[1]) * tap
            if s + 1 < len(taps):
                seen = torch.cat([looks[s + 1], self._refined(s, masked, taps[s + 1])], dim=1)
        return masked

    def _refined(self, stage: int, masked: Tensor, like: Tensor) -> Tensor:
        """Return what a task hands on from a stage, in the shape of the next tap."""
        if not len(self.refine):
            return self._fit(stage + 1, masked, like)
        refine = self.refine[stage]
        if _grows(masked, like):
            refined: Tensor = refine(self._fit(stage + 1, masked, like), like.shape[1])
            return refined
        return self._fit(stage + 1, refine(masked, like.shape[1]), like)

    def _fit(self, stage: int, x: Tensor, like: Tensor) -> Tensor:
        """Resize the positions of `x`, channels first, to those of `like`."""
        size = like.shape[2:]
        if x.shape[2:] == size:
            return x
        if not size:
            return x.flatten(2).mean(2)
        if x.ndim != like.ndim:
            raise ValueError(
                f"MTAN: `stages[{stage}]` must keep the number of axes or make vectors, got "
                f"{like.ndim} axes after {x.ndim}."
            )
        resize, grows = self.resize[stage], _grows(x, like)
        if grows and resize in POOLS:
            raise ValueError(
                f"MTAN: `resize` of `stages[{stage}]` must be 'interp' or 'auto' where maps grow, "
                f"got {resize!r} from {list(x.shape[2:])} to {list(size)}."
            )
        if resize == "interp" or grows:
            mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
            return functional.interpolate(x, size, mode=mode)
        return POOLS["max" if resize == "auto" else resize][len(size) - 1](x, size)


def _grows(x: Tensor, like: Tensor) -> bool:
    """Return whether some axis of positions is longer in the other, both channels first."""
    pairs = zip(x.shape[2:], like.shape[2:], strict=False)
    return any(after > before for before, after in pairs)


def _features(output: Any) -> Tensor:
    """Return the features in what a part of a stage returned.

    Raises:
        ValueError: If it is neither a tensor nor a tuple that starts with one.
    """
    found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor):
        raise ValueError(
            "MTAN: a stage must return a tensor, or a tuple that starts with one, got "
            f"{type(output).__name__}."
        )
    return found


def _split(stage: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the body and the tap of a stage."""
    *body, tap = stages_of("MTAN", "stages", stage)
    return (Chain(*body), tap) if body else (tap, nn.Identity())
