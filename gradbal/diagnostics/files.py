"""Recorded steps as CSV, as JSON lines and for TensorBoard."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from gradbal.diagnostics.course import read
from gradbal.diagnostics.step import Step


def to_csv(steps: Sequence[Step], path: str | Path) -> None:
    """Write a line per step; a cell is empty where the step has no such number.

    Args:
        steps: What to write.
        path: The file.
    """
    rows = [
        {"step": step.number, "seconds": step.seconds, "skipped": step.skipped}
        | {name: float(value) for name, value in scalars(step).items()}
        for step in steps
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def to_jsonl(steps: Sequence[Step], path: str | Path) -> None:
    """Write a JSON object per step; what is not finite becomes null.

    Args:
        steps: What to write.
        path: The file.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for step in steps:
            file.write(json.dumps(_plain({**step._asdict(), "record": vars(step.record)})) + "\n")


def to_tensorboard(steps: Sequence[Step], writer: Any) -> None:
    """Give every number of every step to a writer.

    Args:
        steps: What to write.
        writer: Has ``add_scalar(name, value, step)``.
    """
    for step in steps:
        for name, value in scalars(step).items():
            writer.add_scalar(name, value, step.number)


def scalars(step: Step) -> dict[str, Tensor]:
    """Return a flat dict of 0-dim tensors: the metrics of a step, and how it compares with the sum.

    Of several groups there are the sums of inner products and the worst residual.
    """
    record, course = step.record, read([step])
    if len(record.grams) > 1:
        (gram,), residual = course.grams, course.residuals[0]
        here = gram.diagonal().isfinite().nonzero().flatten()
        record = replace(
            record,
            grams={"": gram[here[:, None], here]},
            members={"": here.tolist()},
            stats={"": {} if residual.isnan() else {"residual": residual}},
        )
    against_sum = {
        "gradbal/cos_to_sum": course.cosine_to_sum[0],
        "gradbal/length_to_sum": course.length_to_sum[0],
    }
    return record.metrics() | {n: v for n, v in against_sum.items() if not v.isnan()}


def _plain(value: Any) -> Any:
    """Return tensors as lists of numbers, as deep as the value goes."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
