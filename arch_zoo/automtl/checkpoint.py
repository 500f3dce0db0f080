"""A file from which a run goes on where it was, and what of a run can be saved."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Generator, Tensor

from arch_zoo.automtl.stages import Batch

Loader: TypeAlias = Callable[[int], Iterable[Batch]]


class Kept(Protocol):
    """What can be saved and loaded."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Stream:
    """Batches without end.

    Args:
        loader: From the number of a pass to its batches, the same for the same number.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.epoch, self.seen = loader, 0, 0
        self.left: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self.left is None:
            self.left = iter(self.loader(self.epoch))
        for batch in self.left:
            self.seen += 1
            return batch
        if not self.seen:
            raise ValueError(f"AutoMTL: `data` must have batches, got none in pass {self.epoch}.")
        self.epoch, self.seen, self.left = self.epoch + 1, 0, None
        return next(self)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "seen": self.seen}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.epoch, self.seen = state_dict["epoch"], state_dict["seen"]
        self.left = iter(self.loader(self.epoch)) if self.seen else None
        for _ in islice(self.left or (), self.seen):
            pass


class Draws:
    """A generator of random numbers.

    Args:
        seed: Of them.
    """

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state_dict["state"].cpu())  # wherever the rest was loaded to


class Checkpoint:
    """Saves the stages of a run, and torch's own random numbers, in one file.

    Args:
        path: The file, read if it is there; None to save nothing.
        run: What the run is, as text; only the same run goes on from a file.
        device: Where random numbers are drawn, beside the CPU.

    Raises:
        ValueError: If the file is of another run.
    """

    def __init__(self, path: Path | None, run: str, device: torch.device) -> None:
        self.path, self.run, self.device = path, run, device
        self.saved: dict[str, Any] | None = None
        if path is not None and path.exists():
            self.saved = torch.load(path, map_location=device, weights_only=True)
            if self.saved["run"] != run:
                raise ValueError(
                    f"AutoMTL: `checkpoint` must be of this run, {run}; {str(path)!r} is of "
                    f"{self.saved['run']}. Give another file, or delete this one."
                )

    def is_past(self, stage: int) -> bool:
        """Whether the file is of a later stage."""
        return self.saved is not None and int(self.saved["stage"]) > stage

    def restore(self, stage: int, parts: Mapping[str, Kept]) -> int:
        """Load parts as they were saved.

        Returns:
            How many steps of the stage are done; 0 if the file is not of this stage.
        """
        if self.saved is None or self.saved["stage"] != stage:
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.saved["parts"][name])
        torch.set_rng_state(self.saved["random"].cpu())
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            module.set_rng_state(self.saved["device_random"].cpu(), self.device)
        return int(self.saved["step"])

    def save(self, stage: int, step: int, parts: Mapping[str, Kept]) -> None:
        """Write the file anew; a kill leaves the old one or the new one."""
        if self.path is None:
            return
        contents = {
            "run": self.run,
            "stage": stage,
            "step": step,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "random": torch.get_rng_state(),
        }
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            contents["device_random"] = module.get_rng_state(self.device)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.new")
        torch.save(contents, fresh)
        fresh.replace(self.path)
