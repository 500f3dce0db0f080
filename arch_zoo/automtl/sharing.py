"""What a policy really shares: an operator that one task alone calls shared is its own copy."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def partners(choices: Mapping[str, Tensor]) -> dict[str, list[tuple[str, ...]]]:
    """Return for each task and operator the other tasks that share it with this one.

    Args:
        choices: One-hot rows ``[operators, 3]`` by task, such as ``policy.argmax()``.

    Returns:
        By task, for each operator the names of the others, none if it is a copy, skipped, or called
        shared by this task alone.

    Example:
        >>> import torch
        >>> rows = torch.eye(3)
        >>> choices = {"depth": rows[[0, 0, 1]], "normal": rows[[0, 2, 1]]}
        >>> partners(choices)["depth"]
        [('normal',), (), ()]
    """
    takes = {task: [bool(shared) for shared in rows[:, 0]] for task, rows in choices.items()}
    found: dict[str, list[tuple[str, ...]]] = {}
    for task, mine in takes.items():
        others = {name: row for name, row in takes.items() if name != task}
        found[task] = [
            tuple(name for name, row in others.items() if shares and row[number])
            for number, shares in enumerate(mine)
        ]
    return found


def effective_sharing(choices: Mapping[str, Tensor]) -> dict[str, float]:
    """Return by task the share of operators that it shares with another task, between 0 and 1.

    Args:
        choices: One-hot rows ``[operators, 3]`` by task.

    Example:
        >>> import torch
        >>> rows = torch.eye(3)
        >>> effective_sharing({"depth": rows[[0, 0]], "normal": rows[[0, 2]]})
        {'depth': 0.5, 'normal': 0.5}
    """
    return {task: _share(others) for task, others in partners(choices).items()}


def _share(others: Sequence[tuple[str, ...]]) -> float:
    return sum(bool(names) for names in others) / len(others)


def split_at(n: int, operators: int, tasks: Sequence[str], like: Tensor) -> dict[str, Tensor]:
    """Return the policy that needs no search: share the first operators, copy the others.

    The sweep over ``n`` is what a search has to beat.

    Args:
        n: Number of operators that all tasks share.
        operators: Number of all operators, in the order of the network.
        tasks: All tasks.
        like: A tensor of the type and on the device wanted.

    Returns:
        One-hot rows ``[operators, 3]`` by task, for ``model.lower(...)``.

    Raises:
        ValueError: If there are fewer operators.

    Example:
        >>> import torch
        >>> split_at(1, 2, ["depth"], torch.ones(1))["depth"].tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if not 0 <= n <= operators:
        raise ValueError(f"split_at: `n` must be between 0 and {operators}, got {n}.")
    rows = like.new_zeros(operators, 3)
    rows[:n, 0] = 1
    rows[n:, 1] = 1
    return {task: rows.clone() for task in tasks}
