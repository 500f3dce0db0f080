"""Pictures in files of the usual formats."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradbal.lab.problems import files


def read(owner: str, path: Path, side: int) -> Tensor:
    """Read a picture and resize it.

    Args:
        owner: The problem.
        path: The file.
        side: Height and width to resize to, in pixels.

    Returns:
        Red, green and blue from 0 to 1, shape ``[3, side, side]``.

    Raises:
        ValueError: If it is no picture, or if there is no package to read it with.
    """
    pillow = files.package(owner, "PIL.Image", "pillow")
    try:
        with pillow.open(path) as image:
            pixels = np.array(image.convert("RGB").resize((side, side), pillow.Resampling.BILINEAR))
    except OSError as error:
        raise ValueError(f"{owner}: {str(path)!r} must be a picture; it cannot be read.") from error
    return torch.from_numpy(pixels).movedim(-1, 0) / 255
