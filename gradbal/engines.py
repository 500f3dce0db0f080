"""How task gradients are computed: presets that users choose from."""

from dataclasses import dataclass, field

from torch import nn

from gradbal import checks
from gradbal.crossing import Batch, loop
from gradbal.crossing.segment import Crossing


class Engine:
    """What the presets have in common."""

    def crossing(self) -> Crossing:
        """Return how cotangents are taken down; called once per optimizer."""
        return loop


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
