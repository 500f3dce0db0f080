"""Cross-stitch networks: one network per task, whose features are mixed between stages."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.encoders import Encoder, copies_of, parts_of, stages_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.layout import widths_of
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.stitch import ChannelRow, LazyReduction, Row, Stitch, SubspaceRow, start_of
from arch_zoo.tensors import check_layout, mix, stack

MIXES = ("stitch", "nddr")


class CrossStitch(MultiTaskModel):
    r"""Each task's network reads a mixture of all networks: :math:`\tilde x_t = \sum_j A_{tj} x_j`.

    The rows of a unit `A` are parameters of their own, since that of the last unit serves one task
    only; all are :meth:`architecture_parameters` and want a larger learning rate than the networks,
    a hundred times in a public reproduction. A task with its own batch sends it through all
    networks up to the last unit.

    With ``mix="nddr"`` it is NDDR-CNN, :math:`\tilde x_t = \mathrm{ReLU}(\mathrm{BN}(W_t [x_1, x_2,
    \dots]))` with a layer `W` over single positions. With ``subspaces`` and ``skips`` it is a
    sluice network: parts of the channels are mixed one by one, and heads read
    :math:`\sum_l \beta_{tl} x_t^l` over the stages.

    Args:
        stages: The networks, staged alike: a mapping of tasks to encoders, a factory called once
            per task, or one encoder, copied for each task so that all start alike.
        heads: One module per task, which reads this task's stream.
        granularity: ``"channel"`` gives every channel a mixture of its own, sized by the first
            input; ``"layer"`` has one for all channels.
        self_weight: Start of the diagonal of `A`, between 0 and 1; the rest of a row is even.
        stitch_after: Indices of the stages followed by a unit; by default all but the last.
        stitch_last: Add a unit after the last stage.
        layout: Axes of the stages' outputs, such as ``"NHWC"`` or ``"NCL"``; by default derived
            from the last layer of each stage.
        mix: ``"stitch"``, or ``"nddr"``, for which ``granularity`` does not count.
        norm: Batch norm in units of ``"nddr"``.
        act: ReLU in units of ``"nddr"``; leave it out where stages end without one.
        subspaces: Parts of the channels that are mixed one by one; 1 for all together. More of them
            take ``granularity="layer"``.
        skips: Let heads read a learned sum of the outputs of all stages, which must have one shape.
        orthogonality_weight: Weight of ``Features.aux["orthogonality"]``, the penalty on the parts
            of each stage's last weight that have the same directions; needs ``subspaces`` above 1.

    Raises:
        TypeError: If a network is no encoder.
        ValueError: If an option is out of range, the networks do not match the tasks, come in one
            piece or differ in their number of stages; in a forward pass, if streams to be mixed
            differ in shape or do not fit the layout.

    Source:
        Misra et al., Cross-stitch Networks for Multi-task Learning, CVPR 2016, the unit of
        two tasks. For more tasks the even off-diagonal is ours: it keeps the sums of rows at one.
        Gao et al., NDDR-CNN, CVPR 2019. Ruder et al., Latent Multi-task Architecture Learning,
        AAAI 2019, with subspaces cut along the channels.

    Example:
        >>> import torch
        >>> heads = {"depth": nn.Linear(8, 1), "normal": nn.Linear(8, 3)}
        >>> model = CrossStitch([nn.Linear(4, 8), nn.Linear(8, 8)], heads, granularity="layer")
        >>> model(torch.ones(5, 4))["normal"].shape
        torch.Size([5, 3])
        >>> for row in model.architecture_parameters():
        ...     print(row.data)
        tensor([0.9000, 0.1000])
        tensor([0.1000, 0.9000])
    """

    def __init__(
        self,
        stages: Encoder | Mapping[str, Encoder],
        heads: Heads,
        *,
        granularity: str = "channel",
        self_weight: float = 0.9,
        stitch_after: Collection[int] | None = None,
        stitch_last: bool = False,
        layout: str | None = None,
        mix: str = "stitch",
        norm: bool = True,
        act: bool = True,
        subspaces: int = 1,
        skips: bool = False,
        orthogonality_weight: float = 0.0,
    ) -> None:
        super().__init__(heads)
        check_layout("CrossStitch", layout)
        _check(granularity, self_weight, mix, subspaces, orthogonality_weight)
        networks = self._networks(stages, stitch_after is None and not stitch_last)
        n_stages = len(networks[self.streams[0]])
        after = set(range(n_stages - 1) if stitch_after is None else stitch_after)
        if outside := sorted(after - set(range(n_stages))):
            raise ValueError(
                f"CrossStitch: `stitch_after` must hold indices of stages, 0 to {n_stages - 1}, "
                f"got {outside[0]}."
            )
        after |= {n_stages - 1} if stitch_last else set()
        self.last_stitch = max(after, default=-1)
        self.subspaces, self.orthogonality_weight = subspaces, orthogonality_weight
        self.networks = nn.ModuleDict({t: nn.Sequential(*net) for t, net in networks.items()})

        n, widths = len(self.streams), widths_of(networks[self.streams[0]])

        def row(number: int) -> nn.Module:
            if subspaces > 1:
                own = range(number * subspaces, (number + 1) * subspaces)
                return SubspaceRow([start_of(i, n * subspaces, self_weight) for i in own])
            start = start_of(number, n, self_weight)
            if mix == "nddr":
                return LazyReduction(start, norm, act)
            return ChannelRow(start) if granularity == "channel" else Row(start)

        def unit(depth: int) -> Stitch:
            rows = {name: row(number) for number, name in enumerate(self.streams)}
            return Stitch(depth, rows, layout, widths[depth])

        self.units = nn.ModuleDict({str(depth): unit(depth) for depth in after})
        self.skips: nn.ParameterDict | None = None
        if skips:
            beta = start_of(n_stages - 1, n_stages, self_weight)
            self.skips = nn.ParameterDict(
                {name: nn.Parameter(torch.tensor(beta)) for name in self.streams}
            )

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def reach(self) -> Reach:
        for name, network in self.networks.items():
            for depth, stage in enumerate(parts_of(network)):
                yield stage, self.streams if depth <= self.last_stitch else (name,)
        for unit in self._units():
            for name, row in unit.rows.items():
                yield row, self.streams if unit.depth < self.last_stitch else (name,)
        if self.skips is not None:
            yield from ((beta, (name,)) for name, beta in self.skips.items())

    def receivers(self) -> Iterator[nn.Module]:
        for network in self.networks.values():
            yield from parts_of(network)

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.units.parameters()
        if self.skips is not None:
            yield from self.skips.parameters()

    def _encode(self, asked: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        networks = {name: parts_of(net) for name, net in self.networks.items()}
        streams = dict.fromkeys(self.streams if self.units else asked, x)
        seen: dict[str, dict[str, Any]] = {name: {} for name in asked}
        for depth in range(len(networks[self.streams[0]])):
            streams = {
                name: call(networks[name][depth], stream, named) for name, stream in streams.items()
            }
            if str(depth) in self.units:
                names = self.streams if depth < self.last_stitch else asked
                streams = self.units[str(depth)](streams, names)
            for name in asked:
                seen[name][f"stage {depth}"] = streams[name]
        if self.skips is not None:
            streams = {
                name: mix("e", self.skips[name], stack("CrossStitch", "all stages", outputs))
                for name, outputs in seen.items()
            }
        return Features(shared=(), per_task={t: streams[t] for t in asked}, aux=self._penalty())

    def _penalty(self) -> dict[str, Tensor]:
        """Return the squared overlap of the subspaces that the last weight of each stage makes."""
        if not self.orthogonality_weight:
            return {}
        terms = []
        for network in self.networks.values():
            for stage in parts_of(network):
                weights = [w for w in stage.parameters() if w.ndim > 1]
                if weights and len(weights[-1]) % self.subspaces == 0:
                    parts = weights[-1].flatten(1).chunk(self.subspaces)
                    terms += [(a.T @ b).square().sum() for a, b in combinations(parts, 2)]
        return (
            {"orthogonality": self.orthogonality_weight * torch.stack(terms).sum()} if terms else {}
        )

    def _units(self) -> Iterator[Stitch]:
        return (unit for unit in self.units.values() if isinstance(unit, Stitch))

    def _networks(
        self, stages: Encoder | Mapping[str, Encoder], several: bool
    ) -> dict[str, list[nn.Module]]:
        """Return the stages of each task's network."""
        names = self.streams
        several = several and len(names) > 1
        if not isinstance(stages, Mapping):
            copies = copies_of(self._owner, "stages", stages, len(names), several)
            return dict(zip(names, copies, strict=True))
        self._among(names, "stages", stages)
        if missing := [name for name in names if name not in stages]:
            raise ValueError(
                f"CrossStitch: `stages` must hold a network for every task, got none for "
                f"{missing[0]!r}."
            )
        networks = {name: stages_of(self._owner, "stages", stages[name], several) for name in names}
        sizes = {name: len(network) for name, network in networks.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"CrossStitch: `stages` must be as many for every task, got {sizes}.")
        return networks


def _check(
    granularity: str, self_weight: float, mix: str, subspaces: int, orthogonality_weight: float
) -> None:
    if granularity not in ("channel", "layer"):
        raise ValueError(
            f"CrossStitch: `granularity` must be 'channel' or 'layer', got {granularity!r}."
        )
    if not 0 <= self_weight <= 1:
        raise ValueError(f"CrossStitch: `self_weight` must be between 0 and 1, got {self_weight}.")
    if mix not in MIXES:
        raise ValueError(f"CrossStitch: `mix` must be 'stitch' or 'nddr', got {mix!r}.")
    if subspaces < 1 or (subspaces > 1 and (granularity, mix) != ("layer", "stitch")):
        raise ValueError(
            "CrossStitch: `subspaces` must be 1, or more with `granularity='layer'` and "
            f"`mix='stitch'`, got {subspaces}."
        )
    if not orthogonality_weight >= 0 or (orthogonality_weight and subspaces == 1):
        raise ValueError(
            "CrossStitch: `orthogonality_weight` must be >= 0, and 0 without subspaces, got "
            f"{orthogonality_weight}."
        )
