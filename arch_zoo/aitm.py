"""AITM: each task reads what the tasks before it know, by attention over two vectors."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.decoders import Decoded, Decoder
from arch_zoo.encoders import Encoder
from arch_zoo.hps import HPS


class Transfer(nn.Module):
    r"""Mix a task's own features and those handed on by the task before.

    Each of the two vectors :math:`x_u` scores itself, :math:`s_u = \langle Q x_u, K x_u \rangle /
    \sqrt d`, and the result is :math:`\sum_u \operatorname{softmax}(s)_u V x_u`.

    Args:
        width: Entries `d` of each vector.

    Example:
        >>> unit = Transfer(2)
        >>> unit(torch.ones(3, 2), torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, own: Tensor, handed: Tensor) -> Tensor:
        """Return the mixture, shape ``[batch, width]`` as both."""
        both = torch.stack([own, handed], dim=1)
        scores = (self.query(both) * self.key(both)).sum(-1) / math.sqrt(both.shape[-1])
        return torch.einsum("bu,bud->bd", torch.softmax(scores, dim=1), self.value(both))


class AITMDecoder(Decoder):
    """A chain of tasks, each of which hands its features on to the next.

    Args:
        towers: By task, in the order of the chain, from the task's stream to ``width`` features.
        heads: By task, from these features to a logit.
        width: Number of features.
        hand_on: Makes the layer through which a task's features go to the next; by default a linear
            layer with a ReLU.
        calibrator_weight: Weight of the penalty on a task that is likelier than the one before it,
            ``aux["calibrator/<task>"]``, for binary tasks of which each is part of the one before.

    Raises:
        ValueError: If towers and heads are not of the same tasks, or the weight is negative.
    """

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        width: int,
        *,
        hand_on: Callable[[], nn.Module] | None = None,
        calibrator_weight: float = 0.6,
    ) -> None:
        super().__init__(tuple(towers))
        if set(towers) != set(heads) or not towers:
            raise ValueError(
                f"AITM: `towers` and `heads` must be of the same tasks, got {sorted(towers)} and "
                f"{sorted(heads)}."
            )
        if not calibrator_weight >= 0:
            raise ValueError(f"AITM: `calibrator_weight` must be >= 0, got {calibrator_weight}.")

        def layer() -> nn.Module:
            return nn.Sequential(nn.Linear(width, width), nn.ReLU())

        later = self.tasks[1:]
        make = hand_on or layer
        self.calibrator_weight = calibrator_weight
        self.towers = nn.ModuleDict(towers)
        self.heads = nn.ModuleDict({name: heads[name] for name in self.tasks})
        self.hand_on = nn.ModuleDict({name: make() for name in later})
        self.transfers = nn.ModuleDict({name: Transfer(width) for name in later})

    def sources(self, task: str) -> tuple[str, ...]:
        return self.tasks[: self.tasks.index(task) + 1]

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        for number, name in enumerate(self.tasks):
            later = self.tasks[number:]
            yield self.towers[name], later
            yield self.heads[name], (name,)
            if number:
                yield self.hand_on[name], later
                yield self.transfers[name], later

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        outputs: dict[str, Tensor] = {}
        z: Tensor | None = None
        for name in self.sources(max(tasks, key=self.tasks.index)):
            own = self.towers[name](streams[name])
            z = own if z is None else self.transfers[name](own, self.hand_on[name](z))
            if name in tasks:
                outputs[name] = self.heads[name](z)
        return Decoded(outputs, aux=self._calibrator(outputs))

    def _calibrator(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the penalties of tasks that are likelier than the one before."""
        pairs = zip(self.tasks, self.tasks[1:], strict=False)
        return {
            f"calibrator/{after}": self.calibrator_weight
            * (torch.sigmoid(outputs[after]) - torch.sigmoid(outputs[before])).relu().mean()
            for before, after in pairs
            if self.calibrator_weight and before in outputs and after in outputs
        }


class AITM(HPS):
    """Adaptive information transfer among a chain of tasks, such as click, then buy, then return.

    Task `t` mixes its own tower with what task `t - 1` hands on, so only the last tower is private.
    Add the calibrator to the losses: ``outputs, aux = model(batch, return_aux=True)``.

    Args:
        encoder: The shared embedding, which reads the batch.
        towers: By task, in the order of the chain, from the embedding to ``width`` features.
        heads: By task, from these features to a logit.
        width: Number of features.
        options: Those of :class:`AITMDecoder`.

    Raises:
        TypeError: If the encoder is none.
        ValueError: As in :class:`AITMDecoder`.

    Source:
        Xi et al., Modeling the Sequential Dependence among Audience Multi-step Conversions with
        Multi-task Learning in Targeted Display Advertising, KDD 2021. Every transfer has maps of
        its own, and the calibrator is a mean over the batch.

    Example:
        >>> towers = {"click": nn.Linear(8, 4), "buy": nn.Linear(8, 4)}
        >>> heads = {"click": nn.Linear(4, 1), "buy": nn.Linear(4, 1)}
        >>> model = AITM(nn.Linear(6, 8), towers, heads, width=4)
        >>> sorted(model.parameter_task_sets()["heads.towers.click.weight"])
        ['buy', 'click']
    """

    def __init__(
        self,
        encoder: Encoder,
        towers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        width: int,
        **options: Any,  # of the decoder
    ) -> None:
        super().__init__(encoder, AITMDecoder(towers, heads, width, **options))
