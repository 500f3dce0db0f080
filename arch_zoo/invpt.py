"""A small InvPT: attention over the pixels of all tasks at once, while maps grow."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.decoders import Decoded, Decoder, Prediction
from arch_zoo.encoders import Encoder
from arch_zoo.heads import Residual, conv_norm, enlarged, resized
from arch_zoo.hps import HPS


class JointAttention(nn.Module):
    """A transformer block over the pixels of all tasks, with keys of a coarser map.

    Args:
        channels: Of all maps.
        heads: Of the attention; they divide the channels.
        pool: Side of the windows whose mean is a key.
        ratio: Hidden width of the perceptron over the channels.
    """

    def __init__(self, channels: int, heads: int, pool: int, ratio: int = 4) -> None:
        super().__init__()
        self.heads, self.pool = heads, pool
        self.norm, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(channels, ratio * channels), nn.GELU(), nn.Linear(ratio * channels, channels)
        )

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return maps ``[batch, channels, height, width]`` by task, as those given."""
        first = next(iter(maps.values()))
        shape = first.shape
        tokens = torch.cat([x.flatten(2).mT for x in maps.values()], dim=1)
        pooled = [
            functional.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
            for x in maps.values()
        ]
        keys = self.norm(torch.cat([x.flatten(2).mT for x in pooled], dim=1))
        q, k, v = (
            torch.unflatten(y, -1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(self.norm(tokens)), self.key(keys), self.value(keys))
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.mlp(self.norm2(tokens))
        parts = tokens.mT.chunk(len(maps), dim=2)
        return {name: part.reshape(shape) for name, part in zip(maps, parts, strict=True)}


class InvPTDecoder(Decoder):
    """Initial predictions, then blocks of joint attention between which the maps double.

    Args:
        outputs: By task the channels of its output.
        channels: Of each task's map at the start; halved at every doubling.
        stages: Blocks of attention; the last output is ``2 ** (stages - 1)`` times as large as the
            encoder's map.
        heads: Of the attention.
        pool: Side of the windows whose mean is a key, at the first block; doubled with the maps.
        weight: Of the loss of an initial prediction, within the loss of its task.

    Raises:
        ValueError: If heads and halvings do not divide the channels.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        *,
        channels: int = 256,
        stages: int = 3,
        heads: int = 2,
        pool: int = 2,
        weight: float = 1.0,
    ) -> None:
        super().__init__(tuple(outputs))
        widths = [channels // 2**s for s in range(stages)]
        if stages < 1 or channels % 2 ** (stages - 1) or widths[-1] % heads:
            raise ValueError(
                "InvPT: `channels` must be divisible by 2 to the `stages` - 1 and then by `heads`, "
                f"got {channels}, {stages} and {heads}."
            )
        self.weight = weight
        self.blocks = nn.ModuleDict({name: Residual(channels) for name in outputs})
        self.initial = nn.ModuleDict(
            {name: nn.Conv2d(channels, n, 1) for name, n in outputs.items()}
        )
        self.mix = nn.ModuleDict({name: nn.LazyConv2d(channels, 1) for name in outputs})
        self.attention = nn.ModuleList(
            JointAttention(width, heads, pool * 2**s) for s, width in enumerate(widths)
        )
        self.up = nn.ModuleList(
            nn.ModuleDict({name: conv_norm(width) for name in outputs}) for width in widths[1:]
        )
        last = widths[-1]
        self.project = nn.ModuleDict(
            {name: nn.ModuleList(nn.Conv2d(w, last, 1) for w in widths) for name in outputs}
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(conv_norm(last), nn.Conv2d(last, outputs[name], 1))
                for name in outputs
            }
        )

    def sources(self, task: str) -> tuple[str, ...]:
        return self.streams

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        for part in (self.blocks, self.initial, self.mix, self.attention, self.up):
            yield part, self.tasks
        for name in self.tasks:
            yield self.project[name], (name,)
            yield self.heads[name], (name,)

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        features = {name: self.blocks[name](streams[name]) for name in self.tasks}
        first = {name: self.initial[name](features[name]) for name in self.tasks}
        maps = {
            name: self.mix[name](torch.cat([features[name], first[name]], dim=1))
            for name in self.tasks
        }
        seen: list[dict[str, Tensor]] = []
        for s, block in enumerate(self.attention):
            if s:
                maps = {
                    name: self.up[s - 1].get_submodule(name)(enlarged(x, 2))
                    for name, x in maps.items()
                }
            maps = block(maps)
            seen.append(maps)
        outputs = {}
        for name in tasks:
            size = seen[-1][name].shape[-2:]
            layers = zip(self.project[name].children(), seen, strict=True)
            total = torch.stack([resized(layer(found[name]), size) for layer, found in layers]).sum(
                0
            )
            outputs[name] = self.heads[name](total)
        predictions = {
            f"{name}/initial": Prediction(
                name, resized(first[name], outputs[name].shape[-2:]), self.weight
            )
            for name in tasks
        }
        return Decoded(outputs, predictions)


class InvPT(HPS):
    """Inverted pyramid transformer, reduced: tasks attend to each other's pixels as maps grow.

    ``model.run(x)`` has the initial predictions; :func:`arch_zoo.task_losses` adds their losses to
    those of their tasks. Memory grows with the square of the number of tasks. A task alone runs the
    features of all.

    Args:
        encoder: The shared encoder, from pictures to a map.
        outputs: By task the channels of its output.
        options: Those of :class:`InvPTDecoder`.

    Raises:
        TypeError: If the encoder is none.
        ValueError: If heads and halvings do not divide the channels.

    Source:
        Ye and Xu, Inverted Pyramid Multi-task Transformer, ECCV 2022, without the passing of
        attention scores between stages and without the encoder's maps of other scales.

    Example:
        >>> options = {"channels": 8, "stages": 2}
        >>> model = InvPT(nn.Conv2d(3, 8, 3, padding=1), {"seg": 5, "depth": 1}, **options)
        >>> model(torch.ones(2, 3, 6, 6))["seg"].shape
        torch.Size([2, 5, 12, 12])
    """

    def __init__(
        self,
        encoder: Encoder,
        outputs: Mapping[str, int],
        **options: Any,  # of the decoder
    ) -> None:
        super().__init__(encoder, InvPTDecoder(outputs, **options))
