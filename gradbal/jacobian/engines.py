"""How task gradients are computed: presets that users choose from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import nn

from gradbal._utils import checks
from gradbal.graph.segments import Piece, split
from gradbal.graph.walk import Boundary
from gradbal.jacobian.factored import factored, find_layers
from gradbal.jacobian.layers import Layer, Sketch
from gradbal.jacobian.loop import loop
from gradbal.jacobian.pull import Crossing, Segment
from gradbal.jacobian.vmap import Batch
from gradbal.rules._base import mix


class Engine:
    """What the presets have in common.

    Attributes:
        keeps: Whether the task gradients of the whole trunk are kept until weights are known.
    """

    keeps: ClassVar[bool] = True

    def crossing(self) -> Crossing:
        """Return how cotangents are taken down; called once per optimizer."""
        return loop

    def layers(self, segment: Segment, n_tasks: int, seed: int) -> Mapping[int, Layer]:
        """Return the layers whose gradients are not to be formed, by position in the segment.

        Args:
            segment: A piece of the graph.
            n_tasks: Number of tasks that go down.
            seed: Of what is drawn in this step.
        """
        return {}

    def pieces(
        self, top: Boundary, index: Mapping[int, int], sizes: Mapping[int, int]
    ) -> list[Piece]:
        """Return the pieces in which the trunk is gone through.

        Args:
            top: Where it begins.
            index: Number of each parameter, by ``id``.
            sizes: Numbers of entries of the parameters whose gradients are wanted, by number.
        """
        return [Piece(top, (), list(sizes))]


@dataclass(frozen=True)
class Sequential(Engine):
    """One pass through the trunk per task: the reference."""


@dataclass(frozen=True)
class Batched(Engine):
    """Several tasks per pass, with ``torch.func.vmap`` over the recorded graph.

    Faster where launching operations dominates (small layers, a GPU), and more memory: the
    activations' gradients of a chunk at a time. What cannot be batched goes one by one, with a
    line in the log.

    Args:
        chunk_size: Tasks per pass; None for all at once.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            checks.at_least(self, 1, chunk_size=self.chunk_size)

    def crossing(self) -> Crossing:
        return Batch(self.chunk_size)


@dataclass(frozen=True)
class Factored(Engine):
    r"""As exact as one pass per task, with fewer operations where layers are wide.

    A weight's task gradient is a product :math:`G_k^\top X` of the cotangent at the layer's output
    and the layer's input, which the graph holds. It need not be formed: inner products follow
    from the factors, and the direction, :math:`(\sum_k w_k G_k)^\top X`, is formed once for all
    tasks. Layer by layer this is done where it costs less by count, which is where a linear layer,
    a convolution or a table sees few rows: wide layers, late convolutions, recommenders, small
    batches. All else goes as with ``Sequential``. Elementwise rules form all gradients in the end
    and gain nothing.

    Args:
        chunk_size: Tasks per pass, batched as with ``Batched`` if there are several; None for all
            at once.
    """

    chunk_size: int | None = 1

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            checks.at_least(self, 1, chunk_size=self.chunk_size)

    def crossing(self) -> Crossing:
        return partial(factored, crossing=loop if self.chunk_size == 1 else Batch(self.chunk_size))

    def layers(self, segment: Segment, n_tasks: int, seed: int) -> Mapping[int, Layer]:
        return find_layers(segment, n_tasks)


@dataclass(frozen=True)
class Sketched(Factored):
    r"""As ``Factored``, with inner products that are right on average only.

    Of a large layer's task gradient :math:`G_k^\top X` the rule sees :math:`G_k^\top X S`, with
    random signs S, drawn anew in every step, that keep inner products on average: for
    :math:`E[S S^\top] = I` they have no bias, and a spread of about
    :math:`\sqrt{2 / \text{size}}` of the product of the norms at worst, for one layer alone
    (Johnson and Lindenstrauss, 1984; signs: Achlioptas, PODS 2001). So a task's pass costs little
    more than the gradients of the layers' outputs. Weights are those of a rule that sees noise;
    the direction is exactly their combination of the task gradients.

    Args:
        chunk_size: As for ``Factored``.
        size: Number of columns of S.
    """

    size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.of_type(self, int, size=self.size)
        checks.at_least(self, 1, size=self.size)

    def layers(self, segment: Segment, n_tasks: int, seed: int) -> Mapping[int, Layer]:
        seeds = [mix(seed, number) for number in segment.numbers]
        return find_layers(segment, n_tasks, lambda i: Sketch(self.size, seeds[i]))


@dataclass(frozen=True)
class Streaming(Engine):
    """As exact as the others, in memory that does not grow with tasks times parameters.

    The trunk is gone through in pieces: the tasks' cotangents cross one piece, its parameters'
    task gradients meet and are dropped, and the next piece follows. When the weights are known,
    one more pass goes down. What is held beyond an ordinary pass are the tasks' cotangents at two
    places of the graph and the task gradients of one piece. For rules that look at inner products
    only.

    Args:
        segments: Number of pieces, about; None for pieces of up to twice the
            size of the largest parameter.
        within: How a piece is gone through: ``Sequential``, ``Batched`` or ``Factored``.
    """

    segments: int | None = None
    within: Engine = field(default_factory=Sequential)
    keeps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.segments is not None:
            checks.of_type(self, int, segments=self.segments)
            checks.at_least(self, 1, segments=self.segments)
        if not isinstance(self.within, Sequential | Batched | Factored):
            raise TypeError(
                "Streaming: `within` must be Sequential(), Batched() or Factored(), got "
                f"{self.within!r}."
            )

    def crossing(self) -> Crossing:
        return self.within.crossing()

    def layers(self, segment: Segment, n_tasks: int, seed: int) -> Mapping[int, Layer]:
        return self.within.layers(segment, n_tasks, seed)

    def pieces(
        self, top: Boundary, index: Mapping[int, int], sizes: Mapping[int, int]
    ) -> list[Piece]:
        if self.segments is None:
            return split(top, index, sizes, 2 * max(sizes.values()))
        return split(top, index, sizes, math.ceil(sum(sizes.values()) / self.segments))


@dataclass(frozen=True, init=False)
class Representation(Engine):
    """Let the rule see gradients with respect to a representation, and go down once.

    The cost hardly grows with the number of tasks. The rule's promises then hold for the
    representation: for min-norm rules an upper bound (MGDA-UB of Sener and Koltun, NeurIPS 2018),
    for others a substitute. What is not finite is found down to the representation, and below it
    only under a ``GradScaler``.

    Args:
        *modules: Modules whose outputs are the representation; none to use the cut that is found
            in the graph, where the tasks' graphs meet.
        pool: ``"batch"`` sums the gradients over the first axis before they meet. Needed when
            each task has inputs of its own, since rows of different inputs share no space; there
            is no bound then. None to flatten them.
    """

    modules: tuple[nn.Module, ...] = field(default=())
    pool: str | None = None
    keeps: ClassVar[bool] = False

    def __init__(self, *modules: nn.Module, pool: str | None = None) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"Representation: expected modules, got {type(module).__name__}; "
                    "name the encoder itself, for example `Representation(model.encoder)`."
                )
        checks.one_of(self, ("batch", None), pool=pool)
        if pool and not modules:
            raise ValueError("Representation: `pool` needs the module to be named.")
        object.__setattr__(self, "modules", modules)
        object.__setattr__(self, "pool", pool)


@dataclass(frozen=True)
class Auto(Engine):
    """Choose among ``Sequential``, ``Batched``, ``Factored``, and ``Streaming`` where memory ends.

    The passes' operations and bytes are counted. Where the counts are clear they decide; else the
    two best take turns in the first steps, and the faster one stays. What has been settled, for
    each number of tasks and size of batch, is kept in ``core``, and ``explain`` tells it. Nothing
    is timed with ``capturable`` or ``torch.use_deterministic_algorithms``, nor for small models
    on a CPU, so that runs are alike to the last bit there.
    """


PRESETS: dict[str, type[Engine]] = {
    "auto": Auto,
    "sequential": Sequential,
    "batched": Batched,
    "factored": Factored,
    "streaming": Streaming,
    "sketched": Sketched,
    "representation": Representation,
}


def make_engine(engine: str | Engine) -> Engine:
    """Return the engine of this name, or the engine itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor an engine.
    """
    if isinstance(engine, Engine):
        return engine
    if isinstance(engine, type) and issubclass(engine, Engine):
        return engine()
    if not isinstance(engine, str):
        raise TypeError(
            f"MTLOptimizer: `engine` must be a name or one of gradbal.engines, got {engine!r}."
        )
    checks.one_of("MTLOptimizer", tuple(PRESETS), engine=engine)
    return PRESETS[engine]()
