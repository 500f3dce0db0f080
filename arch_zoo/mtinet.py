"""MTI-Net: what tasks take over from each other, at every scale of a pyramid."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.decoders import Decoded, Decoder, Prediction
from arch_zoo.encoders import Encoder
from arch_zoo.heads import FPNHead, Residual, resized
from arch_zoo.hps import HPS
from arch_zoo.padnet import Distillation
from arch_zoo.tensors import leaves_of


class Propagation(nn.Module):
    r"""What goes from a scale to the next finer one: a mixture of all tasks, and each task's own.

    With :math:`F = [f_1; \dots; f_T]`, the features of all tasks, the mixture weighs tasks at each
    pixel and channel, :math:`u = R(\operatorname{softmax}_t(A F) \odot F)`, and task `t` hands on
    :math:`f_t + u \odot \sigma(E_t \bar u)`.

    Args:
        channels: Of each task's features.
        tasks: All tasks.
        reduction: Channels over hidden ones of the factors :math:`E`.
    """

    def __init__(self, channels: int, tasks: Sequence[str], reduction: int = 16) -> None:
        super().__init__()
        n = len(tasks) * channels
        hidden = max(1, channels // reduction)
        self.tasks = tuple(tasks)
        self.attention = nn.Sequential(Residual(max(1, n // 4)), nn.LazyConv2d(n, 1))
        self.reduce = Residual(channels)
        self.excite = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(channels, hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, channels),
                    nn.Sigmoid(),
                )
                for name in tasks
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what each task hands on, in the shape of its features."""
        joined = torch.cat([features[name] for name in self.tasks], dim=1)
        scores = torch.unflatten(self.attention(joined), 1, (len(self.tasks), -1))
        shares = torch.softmax(scores, dim=1).flatten(1, 2)
        mixed = self.reduce(shares * joined)
        mean = mixed.mean((2, 3))
        return {
            name: features[name] + self.excite[name](mean)[:, :, None, None] * mixed
            for name in self.tasks
        }


class MTINetDecoder(Decoder):
    """Initial predictions, distillation and propagation at every scale.

    Args:
        outputs: By task the channels of its output.
        channels: Of the maps of the pyramid, from finest to coarsest.
        hidden: Hidden channels of the final heads.
        weight: Of the loss of an initial prediction, within the loss of its task.
        scale: By how much all outputs are enlarged, from the size of the finest map.

    Raises:
        ValueError: If there is no scale.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        channels: Sequence[int],
        *,
        hidden: int = 256,
        weight: float = 1.0,
        scale: int = 1,
    ) -> None:
        super().__init__(tuple(outputs))
        if not channels:
            raise ValueError("MTINet: `channels` must hold those of each map, got none.")
        self.weight, self.scale = weight, scale
        self.levels = nn.ModuleList(
            nn.ModuleDict({name: Residual(width) for name in outputs}) for width in channels
        )
        self.initial = nn.ModuleList(
            nn.ModuleDict({name: nn.Conv2d(width, n, 1) for name, n in outputs.items()})
            for width in channels
        )
        self.propagation = nn.ModuleList(
            Propagation(width, self.tasks) for width in channels[1:]
        )  # from the scale above the finest on
        self.distillation = nn.ModuleDict(
            {
                name: nn.ModuleList(Distillation(width, name, self.tasks) for width in channels)
                for name in outputs
            }
        )
        self.heads = nn.ModuleDict({name: FPNHead(n, hidden) for name, n in outputs.items()})

    def sources(self, task: str) -> tuple[str, ...]:
        return self.streams

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        yield self.levels, self.tasks
        yield self.propagation, self.tasks
        for level in self.initial:
            yield from ((layer, (name,)) for name, layer in level.named_children())
        for name in self.tasks:
            yield self.distillation[name], (name,)
            yield self.heads[name], (name,)

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        pyramids = {name: leaves_of(streams[name]) for name in self.tasks}
        features = self._features(pyramids)
        size = pyramids[self.tasks[0]][0].shape[-2:]
        target = (self.scale * size[0], self.scale * size[1])
        predictions = {
            f"{name}/scale {s}": Prediction(
                name, resized(self.initial[s].get_submodule(name)(found[name]), target), self.weight
            )
            for name in tasks
            for s, found in enumerate(features)
        }
        outputs = {}
        for name in tasks:
            layers = self.distillation[name].children()
            maps = [layer(found) for layer, found in zip(layers, features, strict=True)]
            outputs[name] = resized(self.heads[name](maps), target)
        return Decoded(outputs, predictions)

    def _features(self, pyramids: Mapping[str, Sequence[Tensor]]) -> list[dict[str, Tensor]]:
        """Return the features of all tasks at each scale, from finest to coarsest."""
        n = len(self.levels)
        if any(len(pyramid) != n for pyramid in pyramids.values()):
            came = len(next(iter(pyramids.values())))
            raise ValueError(f"MTINet: the encoder must return {n} maps, got {came}.")
        found: list[dict[str, Tensor]] = []
        handed: dict[str, Tensor] = {}
        for s in reversed(range(n)):
            level: dict[str, Tensor] = {}
            for name in self.tasks:
                x = pyramids[name][s]
                if handed:
                    x = torch.cat([x, resized(handed[name], x.shape[-2:])], dim=1)
                level[name] = self.levels[s].get_submodule(name)(x)
            found.insert(0, level)
            if s:
                handed = self.propagation[s - 1](level)
        return found


class MTINet(HPS):
    """Multi-scale task interaction network, on an encoder that returns a pyramid of maps.

    ``model.run(x)`` has the initial predictions of all scales; :func:`arch_zoo.task_losses` adds
    their losses to those of their tasks. A task alone runs the features of all.

    Args:
        encoder: From pictures to maps, from finest to coarsest, in a list, tuple or dict.
        outputs: By task the channels of its output.
        channels: Of these maps.
        options: Those of :class:`MTINetDecoder`.

    Raises:
        TypeError: If the encoder is none.
        ValueError: If there is no scale; in a forward pass, if the encoder returns another number
            of maps.

    Source:
        Vandenhende et al., MTI-Net: Multi-Scale Task Interaction Networks, ECCV 2020. The attention
        over tasks is the paper's; the authors' code takes a softmax over neighbouring channels.

    Example:
        >>> class Pyramid(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fine, self.coarse = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, 2)
        ...
        ...     def forward(self, x):
        ...         return [self.fine(x), self.coarse(self.fine(x))]
        >>> model = MTINet(Pyramid(), {"seg": 5, "depth": 1}, [4, 6], hidden=8)
        >>> model(torch.ones(2, 3, 10, 10))["seg"].shape
        torch.Size([2, 5, 8, 8])
    """

    def __init__(
        self,
        encoder: Encoder,
        outputs: Mapping[str, int],
        channels: Sequence[int],
        **options: Any,  # of the decoder
    ) -> None:
        super().__init__(encoder, MTINetDecoder(outputs, channels, **options))
