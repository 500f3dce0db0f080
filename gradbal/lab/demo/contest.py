"""Train all rules and the single-task baselines in turn, on the same batches."""

import copy
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from gradbal.lab.demo.model import BATCH, TASKS, Scores, TwoDigitNet, problem, scores_of
from gradbal.lab.demo.report import LOOK_EVERY, Look, Outcome, Report, best_epoch, delta_m
from gradbal.lab.demo.settings import Settings
from gradbal.lab.models.architectures import PLAIN, build
from gradbal.lab.models.two_digits import HEIGHT, WIDTH, heads
from gradbal.lab.problems.pictures import COPIES
from gradbal.lab.problems.problem import Batch, Problem
from gradbal.lab.training.loop import end_epoch, losses_of, one_thread
from gradbal.optimizer import MTLOptimizer
from gradbal.rules._base import LossRule

LR = 4e-3  # the same for all rules, tuned for none


def run(settings: Settings, *, copies: tuple[int, int, int] = COPIES) -> Report:
    """Train, choose epochs on the validation pictures, and test once.

    Args:
        settings: What users may set.
        copies: Size of the data set, see :func:`gradbal.lab.problems.pictures.two_digits`.

    Raises:
        ValueError: If a package is missing or no file can be written into the folder.
        KeyboardInterrupt: If interrupted; its text says how far training came.
    """
    settings.prepare()
    with one_thread():
        data = problem(settings.seed, copies, settings.device)
        single, model = (new_model(settings, data, arch) for arch in (PLAIN, settings.arch))
        alone = [Learner(task, copy.deepcopy(single), data, settings) for task in TASKS]
        together = [
            Balanced(rule, copy.deepcopy(model), data, settings) for rule in settings.contestants
        ]
        train(alone, together, data, settings)
        return Report(*judge(alone, together))


def new_model(settings: Settings, data: Problem, arch: str) -> TwoDigitNet:
    """Return the network that everyone with this architecture starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        body = build(arch, data.stages, heads())
        body(torch.zeros(2, 1, HEIGHT, WIDTH))  # some take their sizes from the first input
    return TwoDigitNet(data, body).to(settings.device)


class Learner:
    """A network that learns one task, in plain torch: the single-task baseline.

    Args:
        name: The task.
        model: The network; nobody else's.
        data: The pictures.
        settings: What users may set.
    """

    def __init__(self, name: str, model: TwoDigitNet, data: Problem, settings: Settings) -> None:
        self.name, self.model, self.data = name, model, data
        self.optimizer = self.make_optimizer(settings)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, settings.epochs)
        self.validation: list[Scores] = []
        self.states: list[dict[str, Tensor]] = []

    def make_optimizer(self, settings: Settings) -> torch.optim.Optimizer:
        """Return what steps the network."""
        return torch.optim.Adam(self.model.parameters(), lr=LR)

    def step(self, batch: Batch, number: int) -> None:
        """Learn from a batch."""
        self.optimizer.zero_grad()
        losses, _ = losses_of(self.model, self.data.tasks, batch)
        torch.autograd.backward(losses[self.name])
        self.optimizer.step()

    def end_epoch(self) -> None:
        """Score this epoch and remember the network as it is."""
        self.scheduler.step()
        self.validation.append(scores_of(self.model, self.data, self.data.validation))
        self.states.append(copy.deepcopy(self.model.state_dict()))

    def test(self, epoch: int) -> Scores:
        """Score the network of an epoch on the test pictures, which had no say in choosing it."""
        self.model.load_state_dict(self.states[epoch])
        return scores_of(self.model, self.data, self.data.test)


class Balanced(Learner):
    """A network that learns all tasks, balanced by a rule.

    Args:
        rule: Name of the rule.
        model: The network; nobody else's.
        data: The pictures.
        settings: What users may set.
        name: What the table calls it; None for the rule's name.
    """

    optimizer: MTLOptimizer

    def __init__(
        self,
        rule: str,
        model: TwoDigitNet,
        data: Problem,
        settings: Settings,
        name: str | None = None,
    ) -> None:
        self.rule = rule
        super().__init__(name or rule, model, data, settings)
        self.times: list[float] = []
        self.looks: list[Look] = []
        observer = torch.optim.SGD(self.model.parameters(), lr=0.0)  # never stepped
        self.observer = MTLOptimizer(observer, "pcgrad")

    def make_optimizer(self, settings: Settings) -> MTLOptimizer:
        return MTLOptimizer(super().make_optimizer(settings), self.rule, seed=settings.seed)

    def step(self, batch: Batch, number: int) -> None:
        """Learn from a batch, take the time, and now and then look at the gradients."""
        looking = number % LOOK_EVERY == 0
        seen = self.observe(batch) if looking and isinstance(self.optimizer.rule, LossRule) else {}
        self._wait()
        start = perf_counter()
        losses, aux = losses_of(self.model, self.data.tasks, batch)
        self.optimizer.step(losses, aux=aux)
        self._wait()
        self.times.append(perf_counter() - start)
        if looking:
            self.looks.append(Look.at(number, {**self.optimizer.metrics(), **seen}))

    def _wait(self) -> None:
        if (device := next(self.model.parameters()).device).type != "cpu":
            torch.accelerator.synchronize(device)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """Look at gradients that the rule itself does not look at; the network stays as it is."""
        losses, _ = losses_of(self.model, self.data.tasks, batch)
        self.observer.backward(losses)
        seen = self.observer.metrics()
        self.observer.zero_grad()
        return {key: value for key, value in seen.items() if "/weight/" not in key}

    def end_epoch(self) -> None:
        super().end_epoch()
        end_epoch(self.optimizer, self.model.body)


def train(
    alone: Sequence[Learner], together: Sequence[Balanced], data: Problem, settings: Settings
) -> None:
    """Give every batch to every learner in turn, so that speed and course compare.

    Args:
        alone: One learner for each task.
        together: Learners of all tasks.
        data: The pictures.
        settings: What users may set.

    Raises:
        KeyboardInterrupt: If interrupted; its text gives the scores so far.
    """
    try:
        _train([*alone, *together], data, settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_so_far(alone, together, settings.epochs)) from None


def _train(learners: Sequence[Learner], data: Problem, settings: Settings) -> None:
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(settings.seed)
    steps = -(-len(data.train) // BATCH)
    with tqdm(total=settings.epochs * steps, desc="Training", unit="step", disable=None) as bar:
        for epoch in range(settings.epochs):
            for i, batch in enumerate(data.train.batches(BATCH, generator)):
                for learner in learners:
                    learner.step(batch, epoch * steps + i)
                bar.update()
            for learner in learners:
                learner.end_epoch()


def _so_far(alone: Sequence[Learner], together: Sequence[Balanced], epochs: int) -> str:
    """Say in one line what the epochs that everyone has finished gave."""
    done = min(len(learner.validation) for learner in (*alone, *together))
    said = f"{done} of {epochs} epochs are trained"
    if not done:
        return f"{said}, so there are no scores yet"
    single = {learner.name: learner.validation[done - 1][learner.name] for learner in alone}
    scores = ", ".join(
        f"{learner.name} {delta_m(learner.validation[done - 1], single):+.1f}"
        for learner in together
    )
    return f"{said}, with Delta_m % on the validation pictures: {scores}"


def judge(alone: Sequence[Learner], together: Sequence[Balanced]) -> tuple[Outcome, list[Outcome]]:
    """Choose everyone's epoch by the validation pictures, then use the test pictures once.

    Returns:
        The three single-task networks as one outcome, and one outcome per rule.
    """
    baseline = Outcome("single task", [{} for _ in alone[0].validation])
    best: Scores = {}
    for learner in alone:
        task = learner.name
        epoch = best_epoch([scores[task] for scores in learner.validation], task)
        best[task] = learner.validation[epoch][task]
        baseline.test[task] = learner.test(epoch)[task]
        for scores, own in zip(baseline.validation, learner.validation, strict=True):
            scores[task] = own[task]
    outcomes = []
    for balanced in together:
        epoch = best_epoch([delta_m(scores, best) for scores in balanced.validation])
        tested = balanced.test(epoch)
        outcomes.append(
            Outcome(balanced.name, balanced.validation, tested, balanced.times, balanced.looks)
        )
    return baseline, outcomes
