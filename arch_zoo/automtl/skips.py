"""What a task does that leaves an operator out."""

import torch
from torch import nn

SKIPS = ("geometry", "identity", "off")


def skip_of(
    operator: nn.Module, before: torch.Size, after: torch.Size, skip: str
) -> nn.Module | None:
    """Return a new module that replaces an operator on inputs of any size, if there is one.

    A convolution has its own geometry: where it keeps shapes, the skip is the identity; elsewhere
    it averages over the convolution's windows, mixes channels where their number changes, and
    norms. Padding beyond half a window leaves windows empty, so there is none. Any other operator
    may be skipped where it keeps the shape of the example.

    Args:
        operator: What is to be left out.
        before: Shape of its input in the example.
        after: Shape of its output.
        skip: ``"geometry"`` for all of these, ``"identity"`` for identities alone, or ``"off"``.
    """
    found: nn.Module | None
    if isinstance(operator, nn.Conv2d) and _is_plain(type(operator)):
        found = _like(operator)
    else:
        found = nn.Identity() if before == after else None
    if skip == "geometry" or (skip == "identity" and isinstance(found, nn.Identity)):
        return found
    return None


def _is_plain(kind: type[nn.Conv2d]) -> bool:
    """Return whether it convolves as `Conv2d` does; a subclass may pad in a way of its own."""
    plain = nn.Conv2d
    return kind.forward is plain.forward and kind._conv_forward is plain._conv_forward


def _like(conv: nn.Conv2d) -> nn.Module | None:
    """Return a skip of the geometry of a convolution."""
    spans = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if isinstance(conv.padding, str):
        doubled = [span - 1 if conv.padding == "same" else 0 for span in spans]
    else:
        doubled = [2 * padding for padding in conv.padding]
    if any(twice > span for twice, span in zip(doubled, spans, strict=True)):
        return None
    layers: list[nn.Module] = []
    if doubled != [span - 1 for span in spans] or set(conv.stride) != {1}:
        window, stride, padding = (
            (sizes[0], sizes[1]) for sizes in (spans, conv.stride, [n // 2 for n in doubled])
        )
        layers.append(nn.AvgPool2d(window, stride, padding, count_include_pad=False))
    if conv.in_channels != conv.out_channels:
        layers.append(nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False))
    if not layers:
        return nn.Identity()
    return nn.Sequential(*layers, nn.BatchNorm2d(conv.out_channels)).to(conv.weight)
