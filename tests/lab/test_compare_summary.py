"""The summaries, against what was published."""

import math
from collections.abc import Mapping, Sequence

import published as pub
import pytest

from gradbal.lab.training.summary import Higher, average, delta_m, delta_p, mean_rank

PICTURES: Higher = {
    "segmentation": {"miou": True, "pixel_accuracy": True},
    "depth": {"abs_err": False, "rel_err": False},
}
ANGLES = {"mean": False, "median": False, "11": True, "22": True, "30": True}
NYUV2: Higher = {**PICTURES, "normal": ANGLES}
QM9: Higher = {f"property {number}": {"mae": False} for number in range(11)}
CELEBA: Higher = {f"attribute {number}": {"f1": True} for number in range(40)}


def nested(row: Sequence[float], higher: Higher) -> dict[str, dict[str, float]]:
    """Return a published row as figures by task."""
    numbers = iter(row)
    return {task: {name: next(numbers) for name in names} for task, names in higher.items()}


def changes(
    table: Mapping[str, Sequence[float]], higher: Higher, methods: Mapping[str, float]
) -> dict[str, float]:
    alone = nested(table["STL"], higher)
    return {name: delta_m(nested(table[name], higher), alone, higher) for name in methods}


def gains(
    table: Mapping[str, Sequence[float]], higher: Higher, methods: Mapping[str, float]
) -> dict[str, float]:
    alone = nested(table["STL"], higher)
    return {name: delta_p(nested(table[name], higher), alone, higher) for name in methods}


def test_delta_m_of_published_rows() -> None:
    found = changes(pub.NYUV2, NYUV2, pub.NYUV2_DELTA_M)
    assert found.pop("IMTL-G") == pytest.approx(-0.60, abs=0.005)  # published as -0.76
    assert found == pytest.approx({k: pub.NYUV2_DELTA_M[k] for k in found}, abs=0.01)
    found = changes(pub.CITYSCAPES, PICTURES, pub.CITYSCAPES_DELTA_M)
    assert found == pytest.approx(pub.CITYSCAPES_DELTA_M, abs=0.006)
    found = changes(pub.QM9, QM9, pub.QM9_DELTA_M)
    assert found == pytest.approx(pub.QM9_DELTA_M, abs=0.05)
    alone, fairgrad = (nested(row, CELEBA) for row in (pub.CELEBA_ALONE, pub.CELEBA_FAIRGRAD))
    assert delta_m(fairgrad, alone, CELEBA) == pytest.approx(0.37012, abs=5e-6)


def test_delta_p_of_published_rows() -> None:
    found = gains(pub.NYUV2, NYUV2, pub.NYUV2_DELTA_P)
    assert found == pytest.approx(pub.NYUV2_DELTA_P, abs=0.006)
    for table, wanted in (
        (pub.OFFICE_31, pub.OFFICE_31_DELTA_P),
        (pub.OFFICE_HOME, pub.OFFICE_HOME_DELTA_P),
    ):
        higher = {f"task {number}": {"accuracy": True} for number in range(len(table["STL"]))}
        assert gains(table, higher, wanted) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("table", "higher", "wanted", "tolerance"),
    [  # published ranks are those of figures that were not yet rounded, so ties differ
        (pub.NYUV2, NYUV2, pub.NYUV2_RANK, 0.13),
        (pub.CITYSCAPES, PICTURES, pub.CITYSCAPES_RANK, 0.26),
        (pub.QM9, QM9, pub.QM9_RANK, 0.11),
    ],
    ids=["nyuv2", "cityscapes", "qm9"],
)
def test_mean_rank_of_published_rows(
    table: Mapping[str, Sequence[float]],
    higher: Higher,
    wanted: Mapping[str, float],
    tolerance: float,
) -> None:
    found = mean_rank({name: nested(table[name], higher) for name in wanted}, higher)
    assert found == pytest.approx(wanted, abs=tolerance)


def test_equal_figures_share_their_ranks() -> None:
    pool = {name: {"a": {"error": error}} for name, error in zip("wxyz", (1, 2, 2, 3), strict=True)}
    ranks = mean_rank(pool, {"a": {"error": False}})
    assert ranks == {"w": 1, "x": 2.5, "y": 2.5, "z": 4}
    assert mean_rank(pool, {"a": {"error": True}}) == {"w": 4, "x": 2.5, "y": 2.5, "z": 1}


def test_delta_m_counts_figures_and_delta_p_tasks() -> None:
    higher = {"a": {"acc": True, "f1": True, "auc": True}, "b": {"error": False}}
    alone = {"a": dict.fromkeys(higher["a"], 0.5), "b": {"error": 2.0}}
    scores = {"a": dict.fromkeys(higher["a"], 0.6), "b": {"error": 3.0}}  # 20 % more, 50 % worse
    assert delta_m(scores, alone, higher) == pytest.approx((-20 - 20 - 20 + 50) / 4)
    assert delta_p(scores, alone, higher) == pytest.approx((20 - 50) / 2)
    assert delta_m(alone, alone, higher) == delta_p(alone, alone, higher) == 0
    assert math.isnan(delta_m(scores, {**alone, "b": {"error": 0.0}}, higher))
    assert math.isnan(delta_p(scores, {**alone, "b": {"error": 0.0}}, higher))


def test_average_is_over_the_chosen_figures() -> None:
    scores = {"a": {"mae": 1.0, "rmse": 9.0}, "b": {"mae": 9.0, "rmse": 3.0}}
    assert average(scores, {"a": "mae", "b": "rmse"}) == 2
