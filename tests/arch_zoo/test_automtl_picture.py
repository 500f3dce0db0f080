"""The picture of a policy: a row per operator, a column per task."""

import sys

import pytest
import torch

from arch_zoo.automtl.picture import policy_picture

OPERATORS = ["stem", "layer1.conv", "layer2.conv"]
POLICY = {
    "seg": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "depth": torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [1.0, 0.0, 0.0]]),
}


def test_every_cell_is_split_as_its_probabilities() -> None:
    figure = policy_picture(POLICY, OPERATORS)
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == OPERATORS
    assert [label.get_text() for label in panel.get_xticklabels()] == ["seg", "depth"]
    widths = torch.tensor([bar.get_width() for bar in panel.patches]).view(2, 3, 3)
    rows = torch.tensor([bar.get_y() + bar.get_height() / 2 for bar in panel.patches])
    assert rows.view(2, 3, 3).tolist() == [[[0, 1, 2]] * 3] * 2
    for column, wanted in enumerate(POLICY.values()):
        torch.testing.assert_close(widths[column].T, 0.9 * wanted.double())
    for bars in zip(*[iter(panel.patches)] * 3, strict=True):
        assert len({bar.get_facecolor() for bar in bars}) == 1
    shades = {(bar.get_facecolor()[0], bar.get_hatch()) for bar in panel.patches}
    assert len(shades) == 3  # in grey, with or without hatching


def test_probabilities_with_a_gradient_are_drawn_and_the_file_has_a_picture(tmp_path) -> None:  # type: ignore[no-untyped-def]
    soft = torch.zeros(3, 3, requires_grad=True).softmax(dim=1)
    policy_picture({"seg": soft}, OPERATORS).savefig(tmp_path / "policy.png")
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_shapes_that_do_not_fit_are_told() -> None:
    sentence = (
        r"^policy_picture: `probabilities` must have shape \[2, 3\] for every task, "
        r"got \[3, 3\] for 'seg'\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        policy_picture(POLICY, OPERATORS[:2])


def test_matplotlib_is_asked_for_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentence = r"^policy_picture: needs matplotlib, which `pip install matplotlib` installs\.$"
    with pytest.raises(ImportError, match=sentence):
        policy_picture(POLICY, OPERATORS)
