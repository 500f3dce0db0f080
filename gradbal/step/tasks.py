"""Which tasks there are: announced, counted or named by the losses."""

from collections.abc import Iterable, Sequence

from gradbal._utils import checks


def announced_tasks(tasks: object) -> list[str]:
    """Return the names of tasks given as names or as their number.

    Raises:
        TypeError: If they are neither.
        ValueError: If there is none, or a name comes twice.
    """
    if isinstance(tasks, int) and not isinstance(tasks, bool):
        checks.at_least("MTLOptimizer", 1, tasks=tasks)
        return [str(i) for i in range(tasks)]
    names = [] if isinstance(tasks, str) or not isinstance(tasks, Iterable) else list(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"MTLOptimizer: `tasks` must be a list of names or their number, got {tasks!r}."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"MTLOptimizer: `tasks` must be distinct names, got {names!r}.")
    return names


def known_tasks(
    known: list[str], names: Sequence[str] | None, count: int, *, numbered: bool
) -> list[str]:
    """Return the names of all tasks, once these losses have come.

    Args:
        known: Those of the tasks known before.
        names: Those of the losses, or None for losses in a list.
        count: How many losses there are.
        numbered: Whether the known names are mere numbers.

    Raises:
        ValueError: If a list has another length than before.
    """
    if names is None:
        if known and count != len(known):
            raise ValueError(
                f"Losses: expected one loss for each of the {len(known)} tasks "
                f"({', '.join(known)}), got {count}; give a mapping to leave tasks out."
            )
        return known or [str(i) for i in range(count)]
    new = [name for name in names if name not in known]
    if not (numbered and new):
        return [*known, *new]
    if len(names) != len(known):
        raise ValueError(
            f"Losses: expected a name for each of the {len(known)} tasks known by number only, "
            f"got {len(names)}; name all of them once, or use `tasks=`."
        )
    return list(names)
