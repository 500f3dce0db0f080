"""MTAN: one trunk, and for each task attention masks over its features."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.blocks import Attention, Bottleneck, Convolution
from arch_zoo.encoders import Encoder, parts_of, stages_of
from arch_zoo.model import Features, Inputs, MultiTaskModel, Reach
from arch_zoo.tensors import channels_first

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
        resize: How features meet the next stage's size: ``"max"`` or ``"avg"`` pooling, or
            ``"interp"``, linear. Features that meet vectors are averaged.

    Raises:
        TypeError: If the stages are no encoder.
        ValueError: If an option is none of these, or the heads cannot be named; in a forward pass,
            if a stage changes the number of axes other than to vectors.

    Source:
        Liu et al., End-to-End Multi-Task Learning with Attention, CVPR 2019, with the
        refinement of the authors' residual network; the norm in its shortcut is ours.

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
        heads: Mapping[str, nn.Module],
        *,
        reduction: int = 4,
        refine: str | None = "residual",
        resize: str = "max",
    ) -> None:
        super().__init__(heads)
        if reduction < 1:
            raise ValueError(f"MTAN: `reduction` must be >= 1, got {reduction}.")
        if refine not in ("residual", "conv", None):
            raise ValueError(f"MTAN: `refine` must be 'residual', 'conv' or None, got {refine!r}.")
        if resize not in ("max", "avg", "interp"):
            raise ValueError(f"MTAN: `resize` must be 'max', 'avg' or 'interp', got {resize!r}.")
        trunk = stages_of(self._owner, "stages", stages)
        self.resize = resize
        self.stages = nn.ModuleList(nn.ModuleList(_split(stage)) for stage in trunk)
        self.attention = nn.ModuleDict(
            {t: nn.ModuleList(Attention(reduction) for _ in trunk) for t in self.tasks}
        )
        block = Bottleneck if refine == "residual" else Convolution
        self.refine = nn.ModuleList(block() for _ in trunk[1:] if refine is not None)

    def encode(self, x: Inputs, tasks: Sequence[str] | None = None) -> Features:
        return self.by_batch(self._encode, tasks, x)

    def reach(self) -> Reach:
        yield self.stages, self.tasks
        yield self.refine, self.tasks
        for name, masks in self.attention.items():
            yield masks, (name,)

    def _encode(self, tasks: tuple[str, ...], x: Tensor) -> Features:
        cut: list[Tensor] = []
        for stage in self.stages:
            for part in parts_of(stage):
                x = part(x)
                cut.append(x.clone())  # no tap has a path to another, or is changed in place
        taps = [channels_first(tap) for tap in cut]
        looks = [
            self._fit(s, u, p) for s, (u, p) in enumerate(zip(taps[::2], taps[1::2], strict=True))
        ]
        per_task = {name: channels_first(self._attend(name, looks, taps[1::2])) for name in tasks}
        return Features(shared=tuple(cut), per_task=per_task, aux={})

    def _attend(self, task: str, looks: list[Tensor], taps: list[Tensor]) -> Tensor:
        """Return the masked last tap of a task, channels first."""
        masks = parts_of(self.attention[task])
        refine = list(self.refine)
        seen = looks[0]
        for s, tap in enumerate(taps):
            masked: Tensor = masks[s](seen, tap.shape[1]) * tap
            if s + 1 < len(taps):
                channels = taps[s + 1].shape[1]
                refined = refine[s](masked, channels) if refine else masked
                seen = torch.cat([looks[s + 1], self._fit(s + 1, refined, taps[s + 1])], dim=1)
        return masked

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
        if self.resize == "interp":
            mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
            return functional.interpolate(x, size, mode=mode)
        return POOLS[self.resize][len(size) - 1](x, size)


def _split(stage: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the body and the tap of a stage."""
    *body, tap = stages_of("MTAN", "stages", stage)
    return (nn.Sequential(*body), tap) if body else (tap, nn.Identity())
