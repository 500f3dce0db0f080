"""Cross-stitch networks: one network per task, whose features are mixed between stages."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from arch_zoo.encoders import Encoder, copies_of, parts_of, stages_of
from arch_zoo.model import Features, Inputs, MultiTaskModel, Reach
from arch_zoo.stitch import Stitch


class CrossStitch(MultiTaskModel):
    r"""Each task's network reads a mixture of all networks: :math:`\tilde x_t = \sum_j A_{tj} x_j`.

    The rows of a unit `A` are parameters of their own, since that of the last unit serves one task
    only; all are :meth:`architecture_parameters` and want a larger learning rate than the networks.
    A task with its own batch sends it through all networks up to the last unit.

    Args:
        stages: The networks, staged alike: a mapping of tasks to encoders, a factory called once
            per task, or one encoder, copied for each task so that all start alike.
        heads: One module per task, which reads this task's stream.
        granularity: ``"channel"`` gives every channel a mixture of its own, sized by the first
            input; ``"layer"`` has one for all channels.
        self_weight: Start of the diagonal of `A`, between 0 and 1; the rest of a row is even.
        stitch_after: Indices of the stages followed by a unit; by default all but the last.
        stitch_last: Add a unit after the last stage.

    Raises:
        TypeError: If a network is no encoder.
        ValueError: If an option is out of range, the networks do not match the tasks or differ in
            their number of stages; in a forward pass, if streams to be mixed differ in shape.

    Source:
        Misra et al., Cross-stitch Networks for Multi-task Learning, CVPR 2016, the unit of
        two tasks. For more tasks the even off-diagonal is ours: it keeps the sums of rows at one.

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
        heads: Mapping[str, nn.Module],
        *,
        granularity: str = "channel",
        self_weight: float = 0.9,
        stitch_after: Collection[int] | None = None,
        stitch_last: bool = False,
    ) -> None:
        super().__init__(heads)
        networks = self._networks(stages)
        n_stages = len(networks[self.tasks[0]])
        after = set(range(n_stages - 1) if stitch_after is None else stitch_after)
        if outside := sorted(after - set(range(n_stages))):
            raise ValueError(
                f"CrossStitch: `stitch_after` must hold indices of stages, 0 to {n_stages - 1}, "
                f"got {outside[0]}."
            )
        after |= {n_stages - 1} if stitch_last else set()
        self.last_stitch = max(after, default=-1)
        self.networks = nn.ModuleDict({t: nn.Sequential(*net) for t, net in networks.items()})
        self.units = nn.ModuleDict(
            {str(depth): Stitch(depth, self.tasks, granularity, self_weight) for depth in after}
        )

    def encode(self, x: Inputs, tasks: Sequence[str] | None = None) -> Features:
        return self.by_batch(self._encode, tasks, x)

    def reach(self) -> Reach:
        for name, network in self.networks.items():
            for depth, stage in enumerate(parts_of(network)):
                yield stage, self.tasks if depth <= self.last_stitch else (name,)
        for unit in self._units():
            for name, row in unit.rows.items():
                yield row, self.tasks if unit.depth < self.last_stitch else (name,)

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        return self.units.parameters()

    def _encode(self, tasks: tuple[str, ...], x: Tensor) -> Features:
        networks = {name: parts_of(net) for name, net in self.networks.items()}
        streams = dict.fromkeys(self.tasks if self.units else tasks, x)
        for depth in range(len(networks[self.tasks[0]])):
            streams = {name: networks[name][depth](stream) for name, stream in streams.items()}
            if str(depth) in self.units:
                names = self.tasks if depth < self.last_stitch else tasks
                streams = self.units[str(depth)](streams, names)
        return Features(shared=(), per_task=streams, aux={})

    def _units(self) -> Iterator[Stitch]:
        return (unit for unit in self.units.values() if isinstance(unit, Stitch))

    def _networks(self, stages: Encoder | Mapping[str, Encoder]) -> dict[str, list[nn.Module]]:
        """Return the stages of each task's network."""
        if not isinstance(stages, Mapping):
            copies = copies_of(self._owner, "stages", stages, len(self.tasks))
            return dict(zip(self.tasks, copies, strict=True))
        self._among(self.tasks, "stages", stages)
        if missing := [name for name in self.tasks if name not in stages]:
            raise ValueError(
                f"CrossStitch: `stages` must hold a network for every task, got none for "
                f"{missing[0]!r}."
            )
        networks = {name: stages_of(self._owner, "stages", stages[name]) for name in self.tasks}
        sizes = {name: len(network) for name, network in networks.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"CrossStitch: `stages` must be as many for every task, got {sizes}.")
        return networks
