"""What was put aside until the rest of a batch is there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradbal.jacobian.by_parameter import ByParameter
from gradbal.step.trees import merged_sums


@dataclass(frozen=True)
class Pending:
    """Sums over the pieces so far; false if there are none. Never changed, only replaced.

    Attributes:
        rows: Task gradients, by parameter and task.
        losses: Losses, by task.
        aux: Gradients of auxiliary losses, by parameter.
        reached: The tasks that reach each parameter in the graphs of the pieces, as a bit set.
    """

    rows: ByParameter = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    aux: dict[int, Tensor] = field(default_factory=dict)
    reached: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def plus(
        self,
        rows: ByParameter,
        losses: Mapping[int, Tensor],
        aux: Mapping[int, Tensor],
        reached: Mapping[int, int],
    ) -> "Pending":
        """Return the sums with another piece."""
        known = self.reached
        both = {n: known.get(n, 0) | reached.get(n, 0) for n in {*known, *reached}}
        numbers = {**self.rows, **rows}
        columns = {n: merged_sums(self.rows.get(n, {}), rows.get(n, {})) for n in numbers}
        return Pending(columns, merged_sums(self.losses, losses), merged_sums(self.aux, aux), both)

    def renumbered(self, moved: Mapping[int, int]) -> "Pending":
        """Follow parameters that have another number now, and forget those that have none."""
        rows = {moved[n]: kept for n, kept in self.rows.items() if n in moved}
        aux = {moved[n]: kept for n, kept in self.aux.items() if n in moved}
        reached = {moved[n]: tasks for n, tasks in self.reached.items() if n in moved}
        return Pending(rows, self.losses, aux, reached)
