"""A driver: the three stages of AutoMTL in turn, saved on the way, from a supermodel to a model."""

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import torch

from arch_zoo.automtl.checkpoint import Checkpoint, Draws
from arch_zoo.automtl.driver import Balance, Driver
from arch_zoo.automtl.lowered import Lowered
from arch_zoo.automtl.presets import SMALL, Preset
from arch_zoo.automtl.record import Data, Record
from arch_zoo.automtl.stages import Losses
from arch_zoo.automtl.supermodel import AutoMTL
from arch_zoo.model import MultiTaskModel


def search(
    model: AutoMTL,
    data: Data,
    losses: Losses,
    validate: Callable[[MultiTaskModel], float],
    balance: Balance,
    preset: Preset = SMALL,
    *,
    samples: int = 0,
    inherit: bool = False,
    batches: int = 1,
    every: int = 100,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[Lowered, Record]:
    """Pre-train a supermodel, search a policy, lower it, and train what comes out.

    A run that was stopped goes on from its checkpoint when the same call is made again, with a
    supermodel built alike, and ends as if it had not been stopped. Torch's random numbers are
    seeded here and afterwards what they were; a loader that draws others has to seed them.

    Args:
        model: The supermodel; it is trained.
        data: Training examples.
        losses: By task, functions of outputs and targets.
        validate: Returns a figure of a model in evaluation mode, where higher is better. It
            chooses, so let it look at validation examples and never at those of the test.
        balance: From an optimizer to one that steps on losses, such as
            ``lambda base: gradbal.MTLOptimizer(base, "upgrad")``.
        preset: The schedule.
        samples: How many policies to draw, of which the best on validation is taken, with the
            weights of the search and norms made anew; 0 for the likeliest policy.
        inherit: Start the last stage from the weights of the search, with norms made anew; else
            from those that the supermodel came with.
        batches: How many batches the rule looks at in a step.
        every: Steps between two looks: a checkpoint, and in the last stage a validation.
        seed: Of what is drawn.
        checkpoint: A file to go on from; None to keep nothing.
        progress: Show bars, where tqdm is installed.

    Returns:
        The lowered model with its best weights on validation, in evaluation mode, and a record.

    Raises:
        TypeError: If what ``balance`` returns takes no losses.
        ValueError: If there are no batches, or the checkpoint is of another run.
    """
    device = next(model.parameters()).device
    options = {"samples": samples, "inherit": inherit, "batches": batches, "every": every}
    run = f"{preset}, {options}, seed {seed}"
    file = Checkpoint(None if checkpoint is None else Path(checkpoint), run, device)
    driver = Driver(
        model=model.train(),
        start=model if inherit else deepcopy(model),
        draws=Draws(seed),
        record=Record(inherited=inherit),
        file=file,
        data=data,
        losses=losses,
        validate=validate,
        balance=balance,
        preset=preset,
        batches=batches,
        every=every,
        progress=progress and find_spec("tqdm") is not None,
    )
    forked = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(forked, device_type=device.type):
        torch.manual_seed(seed)
        driver.pretrain()
        driver.search()
        driver.choose(samples)
        return driver.posttrain(), driver.record
