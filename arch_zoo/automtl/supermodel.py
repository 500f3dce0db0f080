"""AutoMTL: every operator of a traced network, shared, copied or skipped by each task."""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from functools import partial

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from arch_zoo.automtl.branching import Searchable, add_branches, find_operators, make_policy
from arch_zoo.automtl.lowered import Lowered
from arch_zoo.automtl.lowering import lower
from arch_zoo.automtl.operators import Operator, Pass, PerTask
from arch_zoo.automtl.policy import Choices
from arch_zoo.automtl.regularisers import DepthWeighted, Regulariser
from arch_zoo.automtl.skips import SKIPS
from arch_zoo.automtl.tracing import trace
from arch_zoo.decoders import Decoder
from arch_zoo.inputs import Inputs
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach

NORMS = ("shared", "task")


class AutoMTL(MultiTaskModel):
    r"""A network in which every task mixes three branches of every operator, to be searched.

    Task `t` computes :math:`p_0 f(x) + p_1 f_t(x) + p_2 s_t(x)` in place of each searchable `f`:
    the module shared by all tasks, a copy of its own, and a skip. In training one Gumbel-softmax
    sample of the policy serves the forward pass of all batches and the regulariser, which is
    ``Features.aux["policy"]``; in evaluation each task takes its likeliest branches, though all
    run. Call :meth:`lower` for the network that some choices make, which runs what it needs.

    Args:
        backbone: A convolutional network that `torch.fx` traces, or a list of blocks of any kind,
            to be searched as wholes with the norms inside them. It is copied.
        heads: One module per task, which reads the backbone's output.
        example_input: A batch of the usual kind, a tensor or a dict of tensors.
        searchable: Says of a call in the traced network and its module whether to search it; by
            default convolutions with more than one position, or all blocks of a list. Where the
            convolutions hold less than half of the parameters, linear layers and modules of
            ``leaves`` come along. It is asked about calls with one input. A module called twice has
            one choice.
        norm: ``"shared"`` lets all tasks use the same norm layers until it is lowered, where they
            part as the tasks do; ``"task"`` gives each task its own, as published, which shares
            parameters but no computation.
        skip: ``"geometry"`` skips where an average over the operator's windows can stand for it,
            ``"identity"`` where the operator keeps shapes, ``"off"`` nowhere.
        branches: What a task may choose beside the shared module: ``"specific"``, ``"skip"``, or
            both.
        leaves: Classes of modules that are not to be traced through.
        tau: Returns the temperature when called; by default ``Temperature()``.
        regulariser: What makes tasks share, a function of the sample and the policy; by default
            ``DepthWeighted()``.

    Raises:
        ValueError: If an option is none of these, nothing is searchable, what is searched by
            default holds less than half of the parameters, the backbone cannot be traced, or the
            heads cannot be named.

    Source:
        Zhang et al., AutoMTL: A Programming Framework for Automating Efficient Multi-Task
        Learning, NeurIPS 2022. Tasks are trained jointly here, norms may be shared, and skips fit
        any geometry.

    Example:
        >>> import torch
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        >>> heads = {"depth": nn.Linear(8 * 16, 1), "normal": nn.Linear(8 * 16, 3)}
        >>> model = AutoMTL(backbone, heads, torch.zeros(2, 3, 4, 4))
        >>> model.operators
        ('0',)
        >>> sum(p.numel() for p in model.lower().shared_parameters()) == 8 * (3 * 9 + 1)
        True
    """

    def __init__(
        self,
        backbone: nn.Module | Sequence[nn.Module],
        heads: Heads,
        example_input: Inputs,
        *,
        searchable: Searchable | None = None,
        norm: str = "shared",
        skip: str = "geometry",
        branches: Collection[str] = ("specific", "skip"),
        leaves: Collection[type[nn.Module]] = (),
        tau: nn.Module | None = None,
        regulariser: Regulariser | None = None,
    ) -> None:
        super().__init__(heads)
        for name, value, known in (("norm", norm, NORMS), ("skip", skip, SKIPS)):
            if value not in known:
                listed = ", ".join(map(repr, known))
                raise ValueError(f"AutoMTL: `{name}` must be among {listed}, got {value!r}.")
        if not branches or not set(branches) <= {"specific", "skip"}:
            raise ValueError(
                f"AutoMTL: `branches` must hold 'specific', 'skip' or both, got {tuple(branches)}."
            )
        _check_numbers(backbone, example_input)
        traced = trace(backbone, example_input, leaves)
        blocks = not isinstance(backbone, nn.Module)
        operators = find_operators(traced, searchable, blocks, leaves)
        self.operators = tuple(operators)
        self.network = add_branches(
            traced,
            self.streams,
            operators,
            norm == "task",
            skip if "skip" in branches else "off",
            "specific" in branches,
        )
        policy = make_policy(traced, self.streams, operators, self.network, tau)
        self.policy = policy.to(pytree.tree_leaves(example_input)[0].device)
        self.regulariser = DepthWeighted() if regulariser is None else regulariser

    def encode(
        self,
        x: Inputs = None,
        tasks: Sequence[str] | None = None,
        *,
        choices: Choices | None = None,
        **named: Inputs,
    ) -> Features:
        """Compute what the heads read.

        Args:
            x: As in :class:`MultiTaskModel`.
            tasks: As there.
            named: As there, for heads, and for operators whose ``forward`` names them.
            choices: Probabilities of the branches, ``[operators, 3]`` for every task; by default a
                sample of the policy in training, whose regulariser is then returned, and its
                likeliest branches in evaluation.
        """
        if choices is not None:
            for name in self._asked(tasks, {"x": x, **named}):
                self._batch("choices", choices, name)
            return self.by_batch(partial(self._encode, choices), tasks, x, named)
        if not self.training:
            return self.by_batch(partial(self._encode, self.policy.argmax()), tasks, x, named)
        sample = self.policy.sample()
        features = self.by_batch(partial(self._encode, sample), tasks, x, named)
        seen = {s: sample[s] for s in self._streams_of(tuple(features.per_task))}
        aux = {"policy": self.regulariser(seen, self.policy)} if seen else {}
        return features._replace(aux=aux)

    def reach(self) -> Reach:
        for part in self.network.children():
            yield from part.reach() if isinstance(part, PerTask) else [(part, self.streams)]
        for parameter in self.network.parameters(recurse=False):
            yield parameter, self.streams
        for task, logits in self.policy.logits.items():
            yield logits, (task,)

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        return self.policy.logits.parameters()

    def lower(self, choices: Choices | None = None) -> Lowered:
        """Return a copy of what some choices use: a network that computes as this one does.

        Computation is shared as parameters are: tasks that make the same choices on the same input
        go together. With ``norm="shared"`` tasks that have parted have norms of their own, which
        start alike; :func:`arch_zoo.automtl.recalibrate` measures their statistics. For a fresh
        start lower a new model by the same choices.

        Args:
            choices: One-hot rows, ``[operators, 3]`` for every task; by default
                ``policy.argmax()``.

        Raises:
            ValueError: If rows are missing, not one-hot, or choose what an operator has not.
        """
        taken = self.policy.argmax() if choices is None else choices
        legal = self.policy.legal
        for task in self.streams:
            if task not in taken or not _is_choice(taken[task], legal):
                got = "other ones" if task in taken else "none"
                raise ValueError(
                    "AutoMTL: `choices` must hold one-hot rows of legal branches, shape "
                    f"{list(legal.shape)}, got {got} for {task!r}. `policy.draw()` makes some."
                )
        numbers = {task: taken[task].argmax(dim=-1).tolist() for task in self.streams}
        heads = self.heads if isinstance(self.heads, Decoder) else dict(self.heads.items())
        lowered = Lowered(lower(self.network, numbers), heads)
        return deepcopy(lowered).train(self.training)

    def receivers(self) -> Iterator[nn.Module]:
        yield from (part.shared for part in self.network.children() if isinstance(part, Operator))

    def _encode(
        self, choices: Choices, tasks: tuple[str, ...], x: Inputs, **named: Inputs
    ) -> Features:
        per_task = {name: self.network(x, choices[name], Pass(name, named)) for name in tasks}
        return Features(shared=(), per_task=per_task, aux={})


def _check_numbers(backbone: nn.Module | Sequence[nn.Module], example: Inputs) -> None:
    """Raise on the meta device, where a trace cannot be compared with its network."""
    parts = [backbone] if isinstance(backbone, nn.Module) else backbone
    known = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    if any(getattr(x, "is_meta", False) for x in (*known, *pytree.tree_leaves(example))):
        raise ValueError(
            "AutoMTL: `backbone` and `example_input` must hold numbers, got tensors on the meta "
            "device. Build the model on another one and move it."
        )


def _is_choice(rows: Tensor, legal: Tensor) -> bool:
    """Return whether every row is one at a legal branch and zero at all others."""
    if rows.shape != legal.shape:
        return False
    return bool(((rows == 1) & legal).any(dim=-1).all() and (rows != 0).sum() == len(rows))
