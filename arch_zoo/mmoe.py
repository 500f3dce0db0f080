"""MMoE: experts that all tasks share, and one gate per task to mix them."""

from functools import partial

from arch_zoo.encoders import Encoder
from arch_zoo.expert_model import Expert, ExpertModel, num_experts_of
from arch_zoo.gates import POOLED, Gate, SoftmaxGate
from arch_zoo.model import Heads


class MMoE(ExpertModel):
    r"""Multi-gate mixture of experts: :math:`y_t = h_t(\sum_e g_t(x)_e f_e(x))`.

    The gates start at random, so that experts which start equal, as copies of a pretrained network
    do, grow apart; ``Gate(start="even")`` starts at equal weights for all experts, which have to
    differ then. ``Features.shared`` holds the outputs of all experts and, if gates read a stem, the
    stem's output on its way to them. Experts may return structures of tensors, mixed leaf by leaf.

    Args:
        expert: A factory of experts, a list of them, or an :class:`ExpertBank`.
        heads: One module per task, which reads the mixture.
        num_experts: Number of experts; may be left out with a bank or a list.
        gate: What the gates read, and their depth.
        stem: A shared encoder below experts and gates; without, both read the raw input.

    Raises:
        TypeError: If the experts are one module, or the stem is no encoder.
        ValueError: If there is no expert, all experts and gates start equal, or the heads cannot
            be named.

    Source:
        Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts, KDD 2018, equations 6 to 8.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> heads = {"click": nn.Linear(8, 1), "buy": nn.Linear(8, 1)}
        >>> model = MMoE(lambda: nn.Linear(4, 8), heads, num_experts=3)
        >>> feats = model.encode(torch.zeros(5, 4))
        >>> [tuple(z.shape) for z in feats.shared], tuple(feats.per_task["buy"].shape)
        ([(5, 3, 8)], (5, 8))
    """

    def __init__(
        self,
        expert: Expert,
        heads: Heads,
        *,
        num_experts: int | None = None,
        gate: Gate = POOLED,
        stem: Encoder | None = None,
    ) -> None:
        super().__init__(
            heads,
            [expert],
            num_shared=num_experts_of("MMoE", expert, num_experts),
            num_specific=0,
            gate=gate,
            make_gate=partial(SoftmaxGate, gate),
            stem=stem,
        )
