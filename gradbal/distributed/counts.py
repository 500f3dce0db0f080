"""How many samples are behind the loss of each task."""

from collections.abc import Mapping, Sequence

from gradbal.distributed.collectives import OWNER
from gradbal.graph.losses import Batch

Counts = Mapping[str, float] | Sequence[float]


def read_counts(
    counts: Counts | None, names: Sequence[str] | None, numbers: Sequence[int]
) -> dict[int, float]:
    """Return the number of samples behind the loss of each task, by the task's number."""
    if counts is None:
        return {}
    if isinstance(counts, Mapping):
        if names is None:
            raise TypeError(
                f"{OWNER}: `counts` has names and the losses have none; give both as mappings or "
                "both as lists."
            )
        found = [counts.get(name) for name in names]
        if set(counts) - set(names) or None in found:
            raise ValueError(
                f"{OWNER}: `counts` must name the tasks of the losses, {', '.join(names)}, got "
                f"{', '.join(map(str, counts))}."
            )
    else:
        found = list(counts)
    if len(found) != len(numbers):
        raise ValueError(
            f"{OWNER}: `counts` must have one number for each of the {len(numbers)} losses, got "
            f"{len(found)}."
        )
    whole = [float(count) for count in found if count is not None]
    if not all(0 <= count < float("inf") for count in whole):
        raise ValueError(f"{OWNER}: `counts` must be numbers of samples, at least 0, got {whole}.")
    return dict(zip(numbers, whole, strict=True))


def samples_of(batch: Batch, given: Mapping[int, float], n_tasks: int) -> list[float]:
    """Return the number of samples behind every task's loss; -1 where there is no loss."""
    here = dict.fromkeys(batch.tasks, 1.0) | {t: n for t, n in given.items() if t in batch.tasks}
    return [here.get(task, -1.0) for task in range(n_tasks)]
