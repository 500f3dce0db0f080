"""Tables as text: columns for a terminal, and Markdown."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]  # the header first


def plain_table(rows: Rows) -> str:
    """Return rows in columns, a line under the header; columns of numbers end at the right.

    Example:
        >>> print(plain_table([("rule", "steps"), ("uw", "7"), ("famo", "-")]))
        rule  steps
        ----  -----
        uw        7
        famo      -
    """
    columns = [_aligned(column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    cells = [column[0], "-" * width, *column[1:]]
    numbers = all(cell == "-" or cell.lstrip("+-")[:1].isdigit() for cell in column[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]


def markdown_table(rows: Rows, *, code: bool = False) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: The header first.
        code: Write the first cell of each row as code.

    Example:
        >>> print(markdown_table([("rule", "year"), ("uw", "2018")], code=True))
        | rule | year |
        |---|---|
        | `uw` | 2018 |
    """
    header, *body = rows
    if code:
        body = [[f"`{row[0]}`", *row[1:]] for row in body]
    lines = [f"| {' | '.join(row)} |" for row in (header, *body)]
    return "\n".join([lines[0], f"|{'---|' * len(header)}", *lines[1:]])
