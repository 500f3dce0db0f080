"""Task gradients as they are accumulated: one tensor for each parameter and task."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from gradbal.jacobian.pull import Rows
from gradbal.jacobian.unformed import Product
from gradbal.solvers.gram import largest_entries

ByParameter = dict[int, dict[int, Tensor]]  # parameter -> task -> gradient


class RowsByParameter:
    """Keep each gradient as a tensor of its own, so that it can be added to those of other pieces.

    Args:
        tasks: Numbers of the tasks.
        reached: The tasks that reach each parameter, as a bit set.
    """

    def __init__(self, tasks: Sequence[int], reached: Mapping[int, int]) -> None:
        self.tasks, self.reached = tasks, reached
        self.rows: ByParameter = {}

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Keep the gradients of some tasks for some parameters."""
        at = rows.tasks
        chunk = at if isinstance(at, slice) else slice(at, at + 1)
        tasks = self.tasks[chunk]
        for number, grad in zip(numbers, rows.grads, strict=True):
            if grad is not None:
                for i, task in enumerate(tasks):
                    if self.reached[number] >> task & 1:  # a batched pass gives zeros to others
                        row = grad[i] if chunk is at else grad
                        row = row.to_dense() if isinstance(row, Product) else row
                        self.rows.setdefault(number, {})[task] = row


def without_zero_rows(rows: ByParameter) -> ByParameter:
    """Leave out gradients that are exactly zero, but where all of a parameter's are.

    Of a compiled graph it cannot be seen otherwise which task uses which parameter.
    """
    places = [(number, task) for number, column in rows.items() for task in column]
    if not places:
        return rows
    device = rows[places[0][0]][places[0][1]].device
    sizes = largest_entries([rows[number][task] for number, task in places], device).tolist()
    used = {place for place, size in zip(places, sizes, strict=True) if size != 0}  # NaN is used
    found = {n: {t: row for t, row in col.items() if (n, t) in used} for n, col in rows.items()}
    return {number: found[number] or column for number, column in rows.items()}
