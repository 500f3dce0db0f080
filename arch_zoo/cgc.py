"""CGC: shared experts beside experts of each task."""

from functools import partial

from arch_zoo.encoders import Encoder
from arch_zoo.expert_model import Counts, ExpertModel, Experts
from arch_zoo.gates import POOLED, Gate, SoftmaxGate
from arch_zoo.model import Heads


class CGC(ExpertModel):
    r"""Customised gate control: task `t` mixes its own experts `P_t` and the shared ones `S`.

    .. math:: y_t = h_t(g_t(x) \cdot [P_t(x); S(x)])

    The weights of a gate stand in this order, a task's own experts first. ``Features.shared`` holds
    the outputs of the shared experts and, with a stem, the stem's output on its way to gates and
    to the tasks' own experts.

    Args:
        expert: A factory of experts, or a mapping with one for each task and one for ``"shared"``.
        heads: One module per task, which reads the mixture.
        num_shared: Experts that all tasks mix; may be zero.
        num_specific: Experts of each task, one number or one for each task; may be zero.
        gate: What the gates read, and their depth.
        stem: A shared encoder below experts and gates.

    Raises:
        TypeError: If the experts are one module, or the stem is no encoder.
        ValueError: If a task has no expert at all, or the heads cannot be named.

    Source:
        Tang et al., Progressive Layered Extraction, RecSys 2020, its building block.

    Example:
        >>> from torch import nn
        >>> heads = {"click": nn.Linear(8, 1), "buy": nn.Linear(8, 1)}
        >>> model = CGC(lambda: nn.Linear(4, 8), heads, num_shared=2, num_specific=1)
        >>> sum(p.numel() for p in model.shared_parameters()) == 2 * (4 * 8 + 8)
        True
    """

    def __init__(
        self,
        expert: Experts,
        heads: Heads,
        *,
        num_shared: int,
        num_specific: Counts,
        gate: Gate = POOLED,
        stem: Encoder | None = None,
    ) -> None:
        super().__init__(
            heads,
            [expert],
            num_shared=num_shared,
            num_specific=num_specific,
            gate=gate,
            make_gate=partial(SoftmaxGate, gate),
            stem=stem,
        )
