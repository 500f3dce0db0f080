"""Census-Income (KDD): two questions about a person from forty answers, MMoE's benchmark."""

import csv
from pathlib import Path
from sys import intern

import torch
from torch import Tensor, nn

from gradbal.lab.models.encoders import Embedded, mlp, mlp_head
from gradbal.lab.problems import files
from gradbal.lab.problems.losses import binary_cross_entropy
from gradbal.lab.problems.metrics import AUC
from gradbal.lab.problems.problem import Examples, Problem, Published, Task
from gradbal.lab.problems.splitting import standardised

NAME = "census"
EXPECTED = "a file of Census-Income (KDD), census-income.data or .test, plain or gzipped"
FIELDS = 42
EDUCATION, MARITAL, WEIGHT, INCOME = 4, 7, 24, 41
NUMBERS = (0, 5, 16, 17, 18, 30, 39)
MONEY = (5, 16, 17, 18)  # few have any, and some a lot: logarithms
COLLEGE = (
    "Some college but no degree",
    "Associates degree-academic program",
    "Associates degree-occup /vocational",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
QUESTIONS = {
    "income": (INCOME, ("50000+.",)),
    "college": (EDUCATION, COLLEGE),
    "unmarried": (MARITAL, ("Never married",)),
}
WIDTH = 8  # of an embedding
SOURCE = Published(
    source="Ma et al., MMoE, KDD 2018",
    reports="AUC of both tasks on one half of the test file, the other half for validation",
)


def load(
    path: Path,
    *,
    seed: int = 0,
    tasks: tuple[str, str] = ("income", "unmarried"),
    sizes: tuple[int, int] = (60_000, 20_000),
) -> Problem:
    """Answer two of ``QUESTIONS`` from other fields.

    The split is that of the rows as they stand. The instance weight, the income, and the fields
    that the tasks ask for are no inputs. Words that training does not have share one code.

    Args:
        path: The file.
        seed: Draws nothing here.
        tasks: MMoE's first group; its second is ``("college", "unmarried")``.
        sizes: Rows for training and validation; all others are for test.

    Raises:
        ValueError: If the file is not as it must be, or a task is unknown.
    """
    rows = _rows(path, sum(sizes))
    for task in tasks:
        if task not in QUESTIONS:
            raise ValueError(f"{NAME}: `tasks` must be among {', '.join(QUESTIONS)}, got {task!r}.")
    fields = list(zip(*rows, strict=True))
    y = {
        task: torch.tensor([value in yes for value in fields[place]], dtype=torch.float32)
        for task, (place, yes) in QUESTIONS.items()
        if task in tasks
    }
    x, numbers, codes = _inputs(fields, {QUESTIONS[task][0] for task in tasks}, sizes[0])
    ends = (sizes[0], sum(sizes))
    inputs = x.tensor_split(ends)
    targets = {task: answers.tensor_split(ends) for task, answers in y.items()}
    train, validation, test = (
        Examples(part, {task: answers[i] for task, answers in targets.items()})
        for i, part in enumerate(inputs)
    )
    width = numbers + WIDTH * len(codes)
    stem, *others = mlp(width, 128, 64, 64)
    return Problem(
        name=NAME,
        tasks=dict.fromkeys(y, Task(binary_cross_entropy, AUC, "auc")),
        train=train,
        validation=validation,
        test=test,
        stages=(lambda: nn.Sequential(Embedded(numbers, codes, WIDTH), stem()), *others),
        heads=dict.fromkeys(y, mlp_head(64, 32, 1)),
        batch=256,
        published=SOURCE,
    )


def _rows(path: Path, needed: int) -> list[list[str]]:
    lines = files.read_lines(NAME, path, EXPECTED)
    rows = [[intern(field.strip()) for field in row] for row in csv.reader(lines)]  # few differ
    for number, row in enumerate(rows, 1):
        if len(row) != FIELDS:
            raise ValueError(
                f"{NAME}: `path` must be {EXPECTED}; line {number} of {path.name!r} has {len(row)} "
                f"fields, not {FIELDS}."
            )
    if len(rows) <= needed:
        raise ValueError(
            f"{NAME}: `sizes` must leave rows for test; {path.name!r} has {len(rows)}, and "
            f"{needed} are for training and validation."
        )
    return rows


def _inputs(
    fields: list[tuple[str, ...]], asked: set[int], n_train: int
) -> tuple[Tensor, int, tuple[int, ...]]:
    """Return rows of numbers and codes, how many numbers, and how many codes each column has."""
    try:
        numbers = torch.tensor([[float(v) for v in fields[place]] for place in NUMBERS]).T
    except ValueError as error:
        raise ValueError(
            f"{NAME}: fields {', '.join(map(str, NUMBERS))} must be numbers; {error}."
        ) from error
    for column, place in enumerate(NUMBERS):
        if place in MONEY:
            numbers[:, column].log1p_()
    columns, sizes = [], []
    for place, words in enumerate(fields):
        if place in (*NUMBERS, WEIGHT, INCOME) or place in asked:
            continue
        known = {word: code for code, word in enumerate(sorted(set(words[:n_train])), 1)}
        columns.append(torch.tensor([known.get(word, 0) for word in words]))
        sizes.append(len(known) + 1)
    scaled = standardised(numbers, torch.arange(n_train))
    return torch.cat([scaled, torch.stack(columns, dim=1)], dim=1), scaled.shape[1], tuple(sizes)
