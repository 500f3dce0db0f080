"""What a fixed number of operations costs in accuracy: `python -m benchmarks.capturable`."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from gradbal import make_rule
from gradbal._utils.tables import markdown_table
from gradbal.rules._base import Context, GramRule, Weights
from gradbal.rules._registry import RULES
from gradbal.rules._state import state_like

TASKS = (2, 3, 8, 16, 40, 128)
DRAWS = 2


def draw(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def half_rank(m: int, generator: Generator) -> Tensor:
    left = draw(m, max(1, m // 2), generator)
    left[:, 0] = left[:, 0].abs() + 0.3  # in a common half space
    return left @ draw(left.shape[1], left.shape[1] + 3, generator)


def six_decades(m: int, generator: Generator) -> Tensor:
    norms = 10 ** torch.linspace(-3, 3, m, dtype=torch.float64)
    return norms[torch.randperm(m, generator=generator), None] * draw(m, 4 * m + 200, generator)


FAMILIES: dict[str, Callable[[int, Generator], Tensor]] = {
    "well conditioned": lambda m, g: draw(m, 4 * m + 200, g),
    "conflicting": lambda m, g: draw(m, m + 2, g),
    "half the rank": half_rank,
    "six decades": six_decades,
    "correlated": lambda m, g: draw(m, m + 4, g) + 5 * draw(1, m + 4, g),
}


def weights_of(rule: GramRule, jacobian: Tensor, *, capturable: bool) -> Tensor:
    losses = torch.linspace(1, 2, len(jacobian), dtype=torch.float64)
    ctx = Context(
        losses=losses,
        state=state_like(rule, rule.learner or "adam", losses),
        values=None if capturable else losses.tolist(),
        capturable=capturable,
    )
    result = rule.weights(jacobian @ jacobian.T, ctx)
    return result.shared if isinstance(result, Weights) else result


def error(rule: GramRule, m: int) -> float:
    """Worst difference of the directions over all families, relative to what cancels in them."""
    worst = 0.0
    for family in FAMILIES.values():
        for seed in range(DRAWS):
            jacobian = family(m, Generator().manual_seed(seed))
            host, device = (weights_of(rule, jacobian, capturable=flag) for flag in (False, True))
            scale = (host.abs() * jacobian.norm(dim=1)).sum()
            worst = max(worst, ((device - host) @ jacobian).norm().item() / scale.item())
    return worst


def table() -> str:
    """Write one line per Gram rule."""
    lines = [["rule", *map(str, TASKS)]]
    for name in sorted(RULES):
        rule = make_rule(name)
        least = 3 if name == "krum" else 1
        if isinstance(rule, GramRule):
            errors = [f"{error(rule, m):.0e}" if m >= least else "" for m in TASKS]
            lines.append([name, *errors])
    return markdown_table(lines, code=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
