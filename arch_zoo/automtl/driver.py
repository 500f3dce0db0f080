"""The stages of a search, each saved on the way."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import inf, isnan
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from arch_zoo.automtl.checkpoint import Checkpoint, Draws, Kept, Stream
from arch_zoo.automtl.lowered import Lowered
from arch_zoo.automtl.policy import Choices
from arch_zoo.automtl.presets import Preset, Stage
from arch_zoo.automtl.recalibration import recalibrate
from arch_zoo.automtl.record import Best, Data, Record
from arch_zoo.automtl.stages import (
    Losses,
    WeightOptimizer,
    policy_step,
    pretrain_step,
    train_step,
    weight_step,
)
from arch_zoo.automtl.supermodel import AutoMTL
from arch_zoo.model import MultiTaskModel

PRETRAIN, SEARCH, POSTTRAIN = range(3)
NAMES = ("pretrain", "search", "posttrain")
RECALIBRATION = 50  # batches at most from which norms are made anew


class KeptOptimizer(WeightOptimizer, Kept, Protocol):
    """An optimizer on losses whose state can be saved."""


Balance: TypeAlias = Callable[[torch.optim.Optimizer], KeptOptimizer]


@dataclass(kw_only=True)
class Driver:
    """The stages of a search, to be called in turn.

    Args:
        model: The supermodel.
        start: Whose weights the last stage starts from, the supermodel or a copy as it was.
        draws: Of policies.
        record: Is written.
        file: Where the run is saved.
        data: As for :func:`arch_zoo.automtl.search.search`, and so are the others.
        losses: As there.
        validate: As there.
        balance: As there.
        preset: As there.
        batches: As there.
        every: As there.
        progress: As there.
    """

    model: AutoMTL
    start: AutoMTL
    draws: Draws
    record: Record
    file: Checkpoint
    data: Data
    losses: Losses
    validate: Callable[[MultiTaskModel], float]
    balance: Balance
    preset: Preset
    batches: int
    every: int
    progress: bool

    def pretrain(self) -> None:
        stage, stream = self.preset.pretrain, Stream(self.data.train)
        step, optimizer = self._learner(self.model, stage, stream, pretrain_step)
        self._run(PRETRAIN, stage.steps, step, {"optimizer": optimizer, "train": stream})

    def search(self) -> None:
        stage, preset = self.preset.search, self.preset
        streams = {"weights": Stream(self.data.weights), "policy": Stream(self.data.policy)}
        generator = self.draws.generator
        learn, optimizer = self._learner(
            self.model, stage, streams["weights"], partial(weight_step, generator=generator)
        )
        losses = _weighted(self.losses, stage)
        policy_optimizer = preset.policy.optimizer(self.model.architecture_parameters())

        def step(number: int) -> None:
            if not preset.of_policy(number):
                learn(number)
            else:
                preset.policy.set_rate(policy_optimizer, number)
                batch, weight = next(streams["policy"]), preset.policy_weight
                policy_step(
                    self.model, losses, policy_optimizer, batch, weight=weight, generator=generator
                )
            if self._looking(number, stage.steps):
                self.record.course.append(_means(self.model))

        parts: dict[str, Kept] = {"optimizer": optimizer, "policy_optimizer": policy_optimizer}
        self._run(SEARCH, stage.steps, step, {**parts, **streams})

    def choose(self, samples: int) -> None:
        """Settle the policy, the likeliest or the best of those drawn."""
        if self.file.is_past(SEARCH):
            return
        drawn = [self.model.policy.draw(self.draws.generator) for _ in range(samples)]
        for choices in drawn:
            lowered = self.model.lower(choices)
            self._recalibrate(lowered)
            self.record.candidates.append(self._figure(lowered))
        figures = [-inf if isnan(figure) else figure for figure in self.record.candidates]
        chosen = drawn[figures.index(max(figures))] if drawn else self.model.policy.argmax()
        self.record.policy = {task: rows.argmax(1).tolist() for task, rows in chosen.items()}

    def posttrain(self) -> Lowered:
        """Train the lowered model and return it with its best weights."""
        stage, stream, best = self.preset.posttrain, Stream(self.data.train), Best()
        self.file.restore(POSTTRAIN, {"record": self.record})  # the policy, and so the model
        lowered = self.start.lower(_one_hot(self.record.policy, self.model))
        if self.record.inherited:
            self._recalibrate(lowered)
        learn, optimizer = self._learner(lowered.train(), stage, stream, train_step)

        def step(number: int) -> None:
            learn(number)
            if self._looking(number, stage.steps):
                self.record.curve.append(self._figure(lowered))
                if best.offer(self.record.curve[-1], lowered):
                    self.record.best = number + 1

        parts = {"lowered": lowered, "optimizer": optimizer, "train": stream, "best": best}
        self._run(POSTTRAIN, stage.steps, step, parts)
        if best.weights:
            lowered.load_state_dict(best.weights)
        return lowered.eval()

    def _learner(
        self, model: MultiTaskModel, stage: Stage, stream: Stream, step: Callable[..., Any]
    ) -> tuple[Callable[[int], None], KeptOptimizer]:
        """Return what learns weights in the step of a number, and the optimizer that it uses."""
        logits = {id(logit) for logit in model.architecture_parameters()}
        weights = [weight for weight in model.parameters() if id(weight) not in logits]
        base = stage.recipe.optimizer(weights)
        optimizer, losses = self.balance(base), _weighted(self.losses, stage)

        def learn(number: int) -> None:
            stage.recipe.set_rate(base, number)
            step(model, losses, optimizer, *[next(stream) for _ in range(self.batches)])

        return learn, optimizer

    def _run(
        self, stage: int, steps: int, step: Callable[[int], None], parts: Mapping[str, Kept]
    ) -> None:
        """Take the steps of a stage that are not yet done."""
        if self.file.is_past(stage):
            return
        kept: dict[str, Kept] = {"record": self.record, **parts}
        if stage != POSTTRAIN:
            kept |= {"model": self.model, "start": self.start, "draws": self.draws}
        done = self.file.restore(stage, kept)
        numbers: Iterable[int] = range(done, steps)
        if self.progress:
            from tqdm import tqdm

            numbers = tqdm(numbers, NAMES[stage], steps, initial=done, disable=None)
        for number in numbers:
            step(number)
            if self._looking(number, steps):
                self.file.save(stage, number + 1, kept)

    def _looking(self, number: int, steps: int) -> bool:
        return (number + 1) % self.every == 0 or number + 1 == steps

    def _recalibrate(self, lowered: Lowered) -> None:
        recalibrate(lowered, (x for x, _ in islice(self.data.train(0), RECALIBRATION)))

    @torch.no_grad()
    def _figure(self, lowered: Lowered) -> float:
        figure = self.validate(lowered.eval())
        lowered.train()
        return figure


def _weighted(losses: Losses, stage: Stage) -> Losses:
    """Return losses that are multiplied by what a stage says."""
    return {
        task: partial(_scaled, loss, stage.loss_weights.get(task, 1.0))
        for task, loss in losses.items()
    }


def _scaled(
    loss: Callable[[Tensor, Tensor], Tensor], factor: float, output: Tensor, target: Tensor
) -> Tensor:
    return factor * loss(output, target)


def _means(model: AutoMTL) -> dict[str, list[float]]:
    """Return by task the mean probabilities of the three branches."""
    never = ~model.policy.legal
    return {
        task: logits.detach().masked_fill(never, -inf).softmax(1).mean(0).tolist()
        for task, logits in model.policy.logits.items()
    }


def _one_hot(policy: Mapping[str, list[int]], model: AutoMTL) -> Choices:
    """Return the choices as the supermodel takes them."""
    like = next(model.architecture_parameters())
    return {
        task: functional.one_hot(torch.tensor(rows), 3).to(like) for task, rows in policy.items()
    }
