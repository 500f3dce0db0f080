"""The pictures: what they show, in grey, with few tasks and with many."""

import io
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from models import Toy, param, says, wrapped
from numpy.typing import NDArray
from torch import Tensor

from gradbal import Recorder
from gradbal.diagnostics import Layers, layer_conflicts, plots

OVER_STEPS = [
    plots.conflict_matrix,
    plots.cosine_histogram,
    plots.weights_over_time,
    plots.norms_over_time,
]


def recorded(n_tasks: int, steps: int = 60, rule: str = "mgda") -> Recorder:
    model = Toy(n_tasks)
    optimizer = wrapped(model, rule)
    recorder = Recorder(optimizer)
    for batch in range(steps):
        optimizer.step({f"task {i}": loss for i, loss in enumerate(model.losses(batch))})
    return recorder


def drawn(figure: Any) -> NDArray[np.uint8]:
    """Return the pixels, and check that a file can be written."""
    figure.savefig(io.BytesIO(), format="png")
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def overlaps(figure: Any, texts: list[Any]) -> bool:
    boxes = [text.get_window_extent() for text in texts]
    return any(first.overlaps(second) for first, second in pairwise(boxes))


@pytest.mark.parametrize("n_tasks", [2, 40])
@pytest.mark.parametrize("plot", OVER_STEPS)
def test_pictures_stand_alone_and_everything_is_inside(
    plot: Callable[[Recorder], Any], n_tasks: int
) -> None:
    figure = plot(recorded(n_tasks, 12))
    pixels = drawn(figure)
    assert len(np.unique(pixels)) > 2
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()  # nothing is cut off
    panel = figure.axes[0]
    assert not overlaps(figure, panel.get_xticklabels())
    assert not overlaps(figure, panel.get_yticklabels())


@pytest.mark.slow
def test_pictures_leave_pyplot_alone() -> None:
    program = (
        "import sys, torch, gradbal.plots as plots\n"
        "from gradbal.diagnostics import Layers\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.layer_map(Layers(('a', 'b'), {'x': torch.eye(2).double()}))\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True False"


def test_matrix_shows_mean_cosines_and_marks_conflict() -> None:
    recorder = recorded(3)
    figure = plots.conflict_matrix(recorder)
    panel = figure.axes[0]
    means = recorder.course().cosines.nanmean(dim=0)
    shown = torch.tensor(panel.images[0].get_array().filled(torch.nan))
    off = ~torch.eye(3).bool()
    assert torch.equal(shown[off], means[off])
    texts = [text.get_text() for text in panel.texts]
    assert texts[1] == f"{means[0, 1]:.2f}"
    assert texts[0] == ""
    many = plots.conflict_matrix(recorded(20, 5))
    panel = many.axes[0]
    means = torch.tensor(panel.images[0].get_array().filled(torch.nan))
    assert not panel.texts
    assert len(panel.lines[0].get_xdata()) == int((means < 0).sum())


def test_histogram_counts_every_cosine_once() -> None:
    recorder = recorded(4)
    panel = plots.cosine_histogram(recorder).axes[0]
    first, second = torch.triu_indices(4, 4, offset=1)
    cosines = recorder.course().cosines[:, first, second]
    bars = panel.patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    below = [bar for bar in bars if bar.get_hatch()]
    assert all(bar.get_x() + bar.get_width() <= 1e-9 for bar in below)
    share = (cosines < 0).double().mean()
    assert sum(bar.get_height() for bar in below) == pytest.approx(float(share))
    assert panel.get_title() == f"cosines of task gradients, {share:.0%} below zero"


def looks(lines: list[Any]) -> set[tuple[Any, ...]]:
    return {(str(line._dash_pattern), line.get_marker()) for line in lines}


@pytest.mark.parametrize("n_tasks", [2, 8])
def test_curves_average_neighbours_and_differ_without_colour(n_tasks: int) -> None:
    recorder = recorded(n_tasks, 80)
    course = recorder.course()
    for plot, values in (
        (plots.weights_over_time, course.weights),
        (plots.norms_over_time, course.norms),
    ):
        panel = plot(recorder).axes[0]
        assert len(panel.lines) == len(looks(panel.lines)) == n_tasks
        for i, line in enumerate(panel.lines):
            assert line.get_label() == f"task {i}"
            wanted = values[:, i].view(-1, 2).mean(dim=1)
            torch.testing.assert_close(torch.tensor(line.get_ydata()), wanted)
            assert [*line.get_xdata()] == [0.5 + 2 * k for k in range(40)]


def test_many_tasks_have_curves_where_they_stand_out_and_a_band() -> None:
    recorder = recorded(40, 10)
    norms = recorder.course().norms
    panel = plots.norms_over_time(recorder).axes[0]
    assert len(panel.lines) == len(looks(panel.lines)) == plots.CURVES
    labels = {line.get_label() for line in panel.lines}
    gaps = (norms.mean(dim=0) - norms.mean(dim=0).median()).abs()
    assert f"task {int(gaps.argmax())}" in labels
    (band,) = panel.collections
    assert band.get_label() == "32 others"
    others = [i for i in range(40) if f"task {i}" not in labels]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(float(norms[:, others].max()))
    assert heights.min() == pytest.approx(float(norms[:, others].min()))


def test_absent_tasks_leave_gaps() -> None:
    point = param(2)
    optimizer = wrapped([point], "mgda")
    recorder = Recorder(optimizer)
    for number in range(4):
        names = "ab" if number != 2 else "a"
        optimizer.step({name: point[0] * (1 + k) for k, name in enumerate(names)})
    panel = plots.norms_over_time(recorder).axes[0]
    assert np.isnan(panel.lines[1].get_ydata()).tolist() == [False, False, True, False]
    drawn(plots.conflict_matrix(recorder))


def test_layer_map_has_a_column_per_pair() -> None:
    model = Toy()
    found = layer_conflicts(model.named(), model)
    panel = plots.layer_map(found).axes[0]
    assert [t.get_text() for t in panel.get_xticklabels()] == ["a / b", "a / c", "b / c"]
    assert [t.get_text() for t in panel.get_yticklabels()] == [*found.grams]
    shown = torch.tensor(panel.images[0].get_array().filled(torch.nan))
    for row, cosines in zip(shown, found.cosines.values(), strict=True):
        assert torch.equal(row, torch.stack([cosines[0, 1], cosines[0, 2], cosines[1, 2]]))


def test_layer_map_of_many_tasks_has_their_lowest_cosines() -> None:
    tasks = tuple(f"task {i}" for i in range(40))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    rows[7] = 0
    found = Layers(tasks, {f"layer {i}": gram(rows.roll(i, 1)[:, :3]) for i in range(30)})
    figure = plots.layer_map(found)
    drawn(figure)
    shown = torch.tensor(figure.axes[0].images[0].get_array().filled(torch.nan))
    assert shown.shape == (30, 40)
    assert shown[:, 7].isnan().all()
    cosines = found.cosines["layer 3"]
    assert shown[3, 5] == min(cosines[5, i] for i in range(40) if i not in (5, 7))


def gram(rows: Tensor) -> Tensor:
    return rows @ rows.T


def test_nothing_to_draw_is_told() -> None:
    for name in ("conflict_matrix", "cosine_histogram", "norms_over_time"):
        says(
            ValueError,
            f"{name}: no gradients were recorded; the rule looks at the losses alone, or no step "
            "was taken.",
            lambda name=name: getattr(plots, name)(recorded(2, 3, "ew")),  # type: ignore[misc]
        )
    says(
        ValueError,
        "weights_over_time: no weights were recorded; the rule works entry by entry, or no step "
        "was taken.",
        lambda: plots.weights_over_time(recorded(2, 3, "graddrop")),
    )
