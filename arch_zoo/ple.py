"""PLE: levels of shared and private experts, with a stream for every task and a shared one."""

from collections.abc import Sequence
from functools import partial

from arch_zoo.encoders import Encoder
from arch_zoo.expert_model import Counts, ExpertModel, Experts
from arch_zoo.gates import POOLED, Gate, SoftmaxGate
from arch_zoo.model import Heads


class PLE(ExpertModel):
    r"""Progressive layered extraction; one level of it is :class:`CGC`.

    At each level the stream of task `t` becomes a mixture of its own experts' and the shared
    experts' outputs, and the shared stream a mixture of all experts' outputs, which the last level
    needs no more. Each gate reads its own stream. So a task's experts below the last level serve
    all tasks, and only those of the last level and the gates of the last two are its own. A task
    with its own batch sends it through the experts of all tasks.

    Args:
        levels: One factory of experts per level, or a mapping with a factory for each task and one
            for ``"shared"``; experts of a level have one output shape.
        heads: One module per task, which reads this task's last stream.
        num_shared: Shared experts, one number for all levels or a list of one for each; with none,
            the tasks share nothing but the stem.
        num_specific: Experts of each task, one number or one for each task, or a list of these, one
            for each level.
        gate: What the gates read of their streams, and their depth.
        shared_stream: If false, there is no shared stream: shared experts read each task's stream,
            and a task's own experts stay its own at every level.
        stem: A shared encoder below the first level.

    Raises:
        TypeError: If the experts of a level are one module, or the stem is no encoder.
        ValueError: If there is no level, a task has no expert, or the heads cannot be named.

    Source:
        Tang et al., Progressive Layered Extraction, RecSys 2020, the section that names it.

    Example:
        >>> from torch import nn
        >>> heads = {"click": nn.Linear(8, 1), "buy": nn.Linear(8, 1)}
        >>> levels = [lambda: nn.Linear(4, 8), lambda: nn.Linear(8, 8)]
        >>> sets = PLE(levels, heads, num_shared=1, num_specific=1).parameter_task_sets()
        >>> [sorted(sets[f"levels.{i}.specific.buy.experts.weight"]) for i in range(2)]
        [['buy', 'click'], ['buy']]
    """

    def __init__(
        self,
        levels: Sequence[Experts],
        heads: Heads,
        *,
        num_shared: int | Sequence[int],
        num_specific: Counts | Sequence[Counts],
        gate: Gate = POOLED,
        shared_stream: bool = True,
        stem: Encoder | None = None,
    ) -> None:
        if not levels:
            raise ValueError("PLE: `levels` must hold at least one factory of experts, got none.")
        super().__init__(
            heads,
            levels,
            num_shared=num_shared,
            num_specific=num_specific,
            gate=gate,
            make_gate=partial(SoftmaxGate, gate),
            stem=stem,
            shared_stream=shared_stream,
        )
