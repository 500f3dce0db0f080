"""How task gradients are computed: presets that users choose from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from gradbal import checks
from gradbal.crossing import Batch, Segment, factored, find_layers, loop
from gradbal.crossing.segment import Crossing
from gradbal.graph import Plan


class Engine:
    """What the presets have in common."""

    def crossing(self) -> Crossing:
        """Return how cotangents are taken down; called once per optimizer."""
        return loop

    def segment(self, plan: Plan, params: Sequence[Tensor], retain_graph: bool) -> Segment:
        """Return the trunk of one batch, as it is to be gone through.

        Args:
            plan: The plan.
            params: All parameters of the optimizer.
            retain_graph: Keep the graph.
        """
        top = plan.cut if plan.trunk else ()
        return Segment(top, [params[number] for number in plan.trunk], retain_graph)


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

    def segment(self, plan: Plan, params: Sequence[Tensor], retain_graph: bool) -> Segment:
        segment = super().segment(plan, params, retain_graph)
        return segment._replace(layers=find_layers(segment, len(plan.tasks)))


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
    """Choose for the user; so far always one pass per task."""


PRESETS: dict[str, type[Engine]] = {
    "auto": Auto,
    "sequential": Sequential,
    "batched": Batched,
    "factored": Factored,
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
