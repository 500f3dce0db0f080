"""How the columns of a Jacobian are spread over ranks."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Columns(NamedTuple):
    """How the columns of a block are spread over processes.

    Attributes:
        width: How many there are, so that all parts are equal.
        mine: Those that are complete in this process in the end.
        copies: How many processes complete the same ones.
        in_parts: Whether each completes some of them only.
    """

    width: int
    mine: slice = slice(None)
    copies: int = 1
    in_parts: bool = False


class Spread(Protocol):
    """What knows how parameters and columns are spread over processes."""

    def holding(self, number: int) -> Any:  # a hashable with `averaged`
        """Say how a parameter is spread."""

    def columns(self, n: int, holding: Any) -> Columns:
        """Say how columns of parameters that are spread so are spread."""


class RowStorage(Protocol):
    """Storage of rows that can be averaged over ranks: a block of the Jacobian."""

    numbers: list[int]
    rows: Tensor
    averaged: bool
    columns: Columns

    def mine(self, n_rows: int) -> Tensor:
        """View the rows in use where this rank completes them."""
