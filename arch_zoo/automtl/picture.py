"""A picture of a policy: which operators each task shares, keeps for itself, or skips."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Branches in the order of their columns, told apart by shade and hatching, so grey paper will do.
STYLES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("shared", {"facecolor": "white"}),
    ("own copy", {"facecolor": "0.35"}),
    ("skipped", {"facecolor": "0.85", "hatch": "////"}),
)
WIDTH = 0.9  # of a cell, which is one wide


def policy_picture(probabilities: Mapping[str, Tensor], operators: Sequence[str]) -> Any:
    """Draw a row per operator and a column per task, each cell split as likely as the branches.

    Args:
        probabilities: For each task shape ``[operators, 3]``: shared, own copy, skipped; rows that
            sum to 1. Choices made are rows with a single 1.
        operators: Their names, from the input on.

    Returns:
        A matplotlib ``Figure`` of its own, outside of ``pyplot``; save it with
        ``figure.savefig(path)``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the shapes do not fit.
    """
    for task, shares in probabilities.items():
        if shares.shape != (len(operators), 3):
            raise ValueError(
                f"policy_picture: `probabilities` must have shape [{len(operators)}, 3] for every "
                f"task, got {list(shares.shape)} for {task!r}."
            )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "policy_picture: needs matplotlib, which `pip install matplotlib` installs."
        ) from error
    rows, columns = len(operators), len(probabilities)
    figure = Figure(figsize=(2.5 + columns, 1.2 + 0.22 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for column, shares in enumerate(probabilities.values()):
        widths = WIDTH * shares.detach().double().cpu()
        starts = column - WIDTH / 2 + widths.cumsum(dim=1) - widths
        for branch, (label, style) in enumerate(STYLES):
            panel.barh(
                range(rows),
                widths[:, branch].tolist(),
                height=0.8,
                left=starts[:, branch].tolist(),
                label=None if column else label,
                edgecolor="black",
                linewidth=torch.where(widths[:, branch] > 0, 0.6, 0.0).tolist(),
                **style,
            )
    panel.set_xticks(range(columns), list(probabilities))
    panel.set_yticks(range(rows), operators, fontsize=8)
    panel.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
