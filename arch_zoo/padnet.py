"""PAD-Net: initial predictions of all tasks, and what each task takes over from the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.decoders import Decoded, Decoder, Prediction
from arch_zoo.encoders import Encoder
from arch_zoo.heads import Residual, enlarged
from arch_zoo.hps import HPS


class Distillation(nn.Module):
    r"""What a task takes over from the features of others.

    .. math:: o_t = f_t + \sum_{a \ne t} \sigma(G_{ta} f_a) \odot V_{ta} f_a

    Args:
        channels: Of all features.
        task: Whose it is.
        sources: Tasks whose features there are.
    """

    def __init__(self, channels: int, task: str, sources: Sequence[str]) -> None:
        super().__init__()

        def conv() -> nn.Module:
            return nn.Conv2d(channels, channels, 3, padding=1, bias=False)

        self.task = task
        others = [name for name in sources if name != task]
        self.gates = nn.ModuleDict({name: conv() for name in others})
        self.values = nn.ModuleDict({name: conv() for name in others})

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the task's features, shape as each of those given."""
        total = features[self.task]
        for name, gate in self.gates.items():
            total = total + torch.sigmoid(gate(features[name])) * self.values[name](features[name])
        return total


class PADNetDecoder(Decoder):
    """Features and an initial prediction of each task, distillation, and final heads.

    Args:
        outputs: By task the channels of its output.
        auxiliary: By name those of tasks that only help: they have initial predictions alone.
        channels: Of the features of each task.
        block: Makes what turns a stream into the features of a task; by default two
            convolutions with a shortcut.
        weight: Of the loss of an initial prediction, within the loss of its task.
        scale: By how much all outputs are enlarged.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        *,
        auxiliary: Mapping[str, int] | None = None,
        channels: int = 256,
        block: Callable[[], nn.Module] | None = None,
        weight: float = 1.0,
        scale: int = 1,
    ) -> None:
        every = {**outputs, **(auxiliary or {})}
        super().__init__(tuple(outputs), tuple(every))
        make = block or (lambda: Residual(channels))
        self.weight, self.scale = weight, scale
        self.blocks = nn.ModuleDict({name: make() for name in every})
        self.initial = nn.ModuleDict({name: nn.Conv2d(channels, n, 1) for name, n in every.items()})
        self.distillation = nn.ModuleDict(
            {name: Distillation(channels, name, tuple(every)) for name in outputs}
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(Residual(channels), nn.Conv2d(channels, n, 1))
                for name, n in outputs.items()
            }
        )

    def sources(self, task: str) -> tuple[str, ...]:
        return self.streams

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        yield self.blocks, self.tasks
        for name, layer in self.initial.items():
            yield layer, (name,) if name in self.tasks else ()
        for name in self.tasks:
            yield self.distillation[name], (name,)
            yield self.heads[name], (name,)

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        features = {name: block(streams[name]) for name, block in self.blocks.items()}
        asked = [name for name in self.streams if name in tasks or name not in self.tasks]
        predictions = {
            f"{name}/initial": Prediction(
                name, enlarged(self.initial[name](features[name]), self.scale), self.weight
            )
            for name in asked
        }
        outputs = {
            name: enlarged(self.heads[name](self.distillation[name](features)), self.scale)
            for name in tasks
        }
        return Decoded(outputs, predictions)


class PADNet(HPS):
    """Prediction and distillation network: tasks predict first, then read each other's features.

    ``model.run(x)`` has the initial predictions; :func:`arch_zoo.task_losses` adds their losses to
    those of their tasks. A task alone runs the features of all.

    Args:
        encoder: The shared encoder, from pictures to a map.
        outputs: By task the channels of its output.
        options: Those of :class:`PADNetDecoder`.

    Raises:
        TypeError: If the encoder is none.

    Source:
        Xu et al., PAD-Net: Multi-Tasks Guided Prediction-and-Distillation Network, CVPR 2018, its
        third module, on features before the prediction as in the reproduction of Vandenhende et al.

    Example:
        >>> model = PADNet(nn.Conv2d(3, 8, 3, padding=1), {"seg": 5, "depth": 1}, channels=4)
        >>> result = model.run(torch.ones(2, 3, 6, 6))
        >>> list(result.outputs), list(result.predictions)
        (['seg', 'depth'], ['seg/initial', 'depth/initial'])
    """

    def __init__(
        self,
        encoder: Encoder,
        outputs: Mapping[str, int],
        **options: Any,  # of the decoder
    ) -> None:
        super().__init__(encoder, PADNetDecoder(outputs, **options))
