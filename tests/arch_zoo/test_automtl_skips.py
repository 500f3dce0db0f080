"""Skips have the shapes of what they skip."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from arch_zoo.automtl.skips import skip_of

SMALL = st.tuples(st.integers(1, 4), st.integers(1, 4))


def made(conv: nn.Module, skip: str = "geometry") -> nn.Module | None:
    shape = torch.Size((1, 4, 40, 40))
    return skip_of(conv, shape, conv(torch.zeros(shape)).shape, skip)


@settings(deadline=None, max_examples=150)
@given(
    kernel=SMALL,
    stride=SMALL,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=SMALL,
    size=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    channels=st.sampled_from([4, 6]),
)
def test_a_skip_fits_every_geometry_up_to_half_a_window_of_padding(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    channels: int,
) -> None:
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    conv = nn.Conv2d(4, channels, kernel, stride, padding, dilation)
    skip = made(conv)
    if any(2 * p > span for p, span in zip(padding, spans, strict=True)):
        assert skip is None
        return
    assume(all(n + 2 * p >= span for n, p, span in zip(size, padding, spans, strict=True)))
    x = torch.randn(2, 4, *size)
    y = skip.eval()(x)
    assert y.shape == conv(x).shape
    assert y.isfinite().all()
    if isinstance(skip, nn.Identity):
        assert y is x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [1, 2, 3, (5, 4)])
def test_padding_by_name(padding: str, kernel: int) -> None:
    conv = nn.Conv2d(4, 4, kernel, padding=padding)
    skip = made(conv)
    assert isinstance(skip, nn.Identity) == (padding == "same" or kernel == 1)
    x = torch.randn(2, 4, 9, 8)
    assert skip(x).shape == conv(x).shape


def test_what_a_skip_is_made_of() -> None:
    kinds = {
        (4, 1): [],
        (6, 1): [nn.Conv2d, nn.BatchNorm2d],
        (4, 2): [nn.AvgPool2d, nn.BatchNorm2d],
        (6, 2): [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d],
    }
    for (channels, stride), layers in kinds.items():
        skip = made(nn.Conv2d(4, channels, 3, stride, padding=1))
        assert [type(layer) for layer in skip.children()] == layers
    depthwise = made(nn.Conv2d(4, 4, 3, groups=4, padding=1))
    assert isinstance(depthwise, nn.Identity)
    assert made(nn.Conv2d(4, 6, 1, dtype=torch.float32)).to(torch.float64)


def test_a_pool_ignores_padding() -> None:
    skip = made(nn.Conv2d(4, 4, 4, 2, padding=2))
    torch.testing.assert_close(skip[0](torch.ones(1, 4, 7, 7)), torch.ones(1, 4, 4, 4))


class SamePadded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_other_operators_are_skipped_where_they_keep_shapes() -> None:
    assert isinstance(made(SamePadded(4, 4, 2)), nn.Identity)
    assert made(SamePadded(4, 6, 2)) is None
    assert isinstance(made(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())), nn.Identity)
    assert made(nn.Sequential(nn.Conv2d(4, 4, 3, 2, padding=1), nn.ReLU())) is None


def test_modes() -> None:
    keeps, halves = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, 2)
    assert isinstance(made(keeps, "identity"), nn.Identity)
    assert made(halves, "identity") is None
    assert made(keeps, "off") is None
