"""Pictures with labels for every pixel, as MTAN's authors preprocessed them: folders of arrays."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from gradbal.lab.problems import files
from gradbal.lab.problems.problem import Stored
from gradbal.lab.problems.splitting import shuffled

Kinds = dict[str, tuple[int, ...]]  # of arrays, with the axes that they have beside two of pixels
Labels = dict[str, Tensor]
SCALES = (1.0, 1.2, 1.5)


def splits(
    owner: str, path: Path, kinds: Kinds, classes: int, seed: int, validation: float
) -> tuple[Stored, Stored, Stored]:
    """Find the pictures; the published split has two parts, so validation is cut from training.

    Args:
        owner: The problem.
        path: Folder with ``train`` and ``val``, each with one folder for each kind of array.
        kinds: The kinds of arrays; the first is the picture.
        classes: Number of classes of the pixels.
        seed: Draws the pictures for validation.
        validation: Share of the training pictures.

    Returns:
        For training, with random changes, for validation and for test, which is ``val``.

    Raises:
        ValueError: If a folder is missing, or folders do not have the same arrays.
    """
    counts = [_count(owner, path / part, kinds) for part in ("train", "val")]
    known, chosen = shuffled(counts[0], seed, round((1 - validation) * counts[0]))
    read: list[Callable[[int], tuple[Tensor, Labels]]] = [
        partial(_read, owner, path / part, kinds, classes) for part in ("train", "val")
    ]
    test = Stored(torch.arange(counts[1]), read[1])
    return Stored(known, read[0], augmented), Stored(chosen, read[0]), test


def augmented(x: Tensor, y: Labels, generator: Generator) -> tuple[Tensor, Labels]:
    """Cut a piece out, enlarge it to the old size, and swap left and right in half the cases.

    What is enlarged is nearer, and what is swapped faces the other way. Labels are not mixed
    with those of their neighbours.

    Args:
        x: The picture, shape ``[3, height, width]``.
        y: Its labels.
        generator: Source of randomness.
    """
    scale = SCALES[_draw(len(SCALES), generator)]
    height, width = (int(side / scale) for side in x.shape[1:])
    top = _draw(x.shape[1] - height + 1, generator)
    left = _draw(x.shape[2] - width + 1, generator)
    flip = bool(_draw(2, generator))

    def moved(image: Tensor, mode: str) -> Tensor:
        piece = image[..., top : top + height, left : left + width]
        whole = piece.reshape(1, -1, height, width).to(x.dtype)
        whole = F.interpolate(whole, size=x.shape[1:], mode=mode).view_as(image).to(image.dtype)
        return whole.flip(-1) if flip else whole

    labels = {task: moved(image, "nearest") for task, image in y.items()}
    labels["depth"] = labels["depth"] / scale
    if flip and "normal" in labels:
        labels["normal"] = labels["normal"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return moved(x, "bilinear"), labels


def _draw(n: int, generator: Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _count(owner: str, path: Path, kinds: Kinds) -> int:
    expected = f"a folder with train and val, each with the folders {', '.join(kinds)}"
    names = {
        kind: {file.name for file in files.existing(owner, path / kind, expected).glob("*.npy")}
        for kind in kinds
    }
    count = max(map(len, names.values()))
    for number in range(max(count, 1)):
        for kind, found in names.items():
            if f"{number}.npy" not in found:
                raise ValueError(
                    f"{owner}: every folder of {str(path)!r} must have the arrays 0.npy to "
                    f"{max(count - 1, 0)}.npy; {kind!r} has no {number}.npy."
                )
    return count


def _read(owner: str, path: Path, kinds: Kinds, classes: int, number: int) -> tuple[Tensor, Labels]:
    arrays: Labels = {}
    size: tuple[int | None, ...] = (None, None)  # until the picture is there
    for kind, axes in kinds.items():
        array = files.read_array(owner, path / kind / f"{number}.npy", (*size, *axes))
        arrays[kind], size = torch.from_numpy(array), array.shape[:2]
    image, label, depth = (arrays.pop(kind) for kind in ("image", "label", "depth"))
    if label.max() >= classes:
        raise ValueError(
            f"{owner}: classes must be below {classes}, or negative where there is none; "
            f"{str(path / 'label' / f'{number}.npy')!r} has {label.max():g}."
        )
    depth = depth[..., 0].float()
    depth = depth.where(depth != 0, torch.nan)  # 0 stands for: not measured
    labels = {"segmentation": label.long(), "depth": depth}
    for kind, vectors in arrays.items():  # normals, where there are any; all 0: not known
        known = (vectors != 0).any(dim=-1, keepdim=True)
        labels[kind] = vectors.float().where(known, torch.nan).movedim(-1, 0)
    return image.float().movedim(-1, 0), labels
