"""A rule's tensors: which of their axes run over tasks, and parts of them for some tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradbal.rules._base import GradientRule, Rule, State
from gradbal.rules._learned import slots

Axes = dict[str, tuple[int, ...]]

KEPT = 2**14  # sets of tasks; of forty tasks every step may have another one
_INDICES: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def new_state(rule: Rule, learner: str, n_tasks: int, device: torch.device) -> State:
    """Make a rule's tensors, those of its learner among them, as at the first step.

    Raises:
        ValueError: If an option has not one number per task.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return state_like(rule, learner, torch.zeros(n_tasks, dtype=dtype, device=device))


def state_like(rule: Rule, learner: str, losses: Tensor) -> State:
    """Make the same, sized for these losses, of which only shape, dtype and device are used."""
    n_tasks, state = losses.shape[0], rule.init(losses)
    if not (rule.per_task or rule.learned):
        return state
    for name, values in per_task_options(rule, n_tasks).items():
        state[name] = losses.new_tensor(values)
    for name in rule.learned:
        state |= slots(name, state[name], learner)
    return state


def per_task_options(rule: Rule, n_tasks: int) -> dict[str, Sequence[float]]:
    """Return the options of a rule that were given with one number per task.

    Raises:
        ValueError: If one has another length.
    """
    given = {name: getattr(rule, name) for name in rule.per_task}
    for name, values in given.items():
        if values is not None and len(values) != n_tasks:
            raise ValueError(
                f"{type(rule).__name__}: `{name}` must have one number for each of the {n_tasks} "
                f"tasks, got {len(values)}."
            )
    return {name: values for name, values in given.items() if values is not None}


def per_task_numbers(
    rule: Rule, option: str, values: Mapping[str, float] | Sequence[float], names: Sequence[str]
) -> list[float]:
    """Return new values of an option with one number per task, in the order of the tasks.

    Raises:
        ValueError: If the rule has no such option, or there is not one number for each task.
    """
    rule_name = type(rule).__name__
    if option not in rule.per_task:
        known = ", ".join(rule.per_task) or "none"
        raise ValueError(
            f"{rule_name}: {option!r} is no option with one number per task; there is {known}."
        )
    fits = set(values) == set(names) if isinstance(values, Mapping) else len(values) == len(names)
    if not fits:
        raise ValueError(
            f"{rule_name}: `{option}` must have one number for each of the tasks "
            f"{', '.join(names)}, got {values!r}."
        )
    return [float(values[name]) for name in names] if isinstance(values, Mapping) else [*values]


def task_axes(rule: Rule, learner: str) -> Axes:
    """Find which axes of a rule's tensors run over tasks, by making them in two sizes."""
    small, large = (rule.init(torch.zeros(n, dtype=torch.float64)) for n in (2, 3))
    axes: Axes = {
        name: tuple(i for i, size in enumerate(tensor.shape) if large[name].shape[i] != size)
        for name, tensor in small.items()
    }
    axes |= dict.fromkeys(rule.per_task, (0,))
    for name in rule.learned:
        axes |= dict.fromkeys(slots(name, small[name], learner), axes[name])
    return axes


def row_axes(rule: Rule) -> Axes:
    """Find which tensors that a rule keeps for a parameter have one row per task."""
    if not isinstance(rule, GradientRule):
        return {}
    small, large = (rule.buffers(torch.zeros(n, 1)) for n in (2, 3))
    return {name: (0,) if large[name].shape != t.shape else () for name, t in small.items()}


def for_tasks(rows: Tensor, n_tasks: int) -> Tensor:
    """Return rows of the same kind for another number of tasks; only their kind may be used."""
    return rows.new_empty((1, *rows.shape[1:])).expand(n_tasks, *rows.shape[1:])


def some_rows(tensor: Tensor, axes: tuple[int, ...], tasks: Sequence[int] | None) -> Tensor:
    """Return the rows of some tasks; the tensor itself if these are all."""
    return tensor if tasks is None else part(tensor, axes, tasks)


def grown_rows(buffers: State, axes: Axes, n_tasks: int) -> State:
    """Return what is kept for a parameter with empty rows for new tasks."""
    return {
        name: torch.cat([t, t.new_zeros(n_tasks - len(t), *t.shape[1:])]) if axes[name] else t
        for name, t in buffers.items()
    }


def task_index(tasks: Sequence[int], device: torch.device) -> Tensor:
    """Return the numbers of tasks as an index on a device, made once: a copy there makes it wait.

    None is dropped, because a captured graph may read it; further sets of tasks are made each time.

    Args:
        tasks: Numbers of the tasks.
        device: Where the index is used.
    """
    key = tuple(tasks), device
    index = _INDICES.get(key)
    if index is None:
        index = torch.tensor(key[0], device=device, dtype=torch.int64)
        if len(_INDICES) < KEPT and type(index).__name__ != "FakeTensor":  # it ends with its mode
            _INDICES[key] = index
    return index


def part(tensor: Tensor, axes: tuple[int, ...], tasks: Sequence[int] | None) -> Tensor:
    """Return a copy of a tensor, restricted to some tasks.

    Args:
        tensor: One of a rule's tensors.
        axes: Its axes that run over tasks.
        tasks: Numbers of the tasks; None for all.
    """
    if tasks is None or not axes:
        return tensor.clone()
    index = task_index(tasks, tensor.device)
    for axis in axes:
        tensor = tensor.index_select(axis, index)
    return tensor


def merged(
    whole: Tensor, new: Tensor, axes: tuple[int, ...], tasks: Sequence[int] | None
) -> Tensor:
    """Return a tensor in which some tasks have new entries; the arguments are as in ``part``."""
    if tasks is None or not axes:
        return new
    index = task_index(tasks, whole.device)
    if len(axes) == 1:
        return whole.index_copy(axes[0], index, new)
    whole = whole.clone()
    whole[index[:, None], index] = new
    return whole


def grown(state: State, larger: State) -> State:
    """Return a state of more tasks in which the old entries stand."""
    for name, old in state.items():
        larger[name][tuple(slice(0, size) for size in old.shape)] = old
    return larger
