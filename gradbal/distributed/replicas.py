"""Several processes that each have a part of the batch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradbal._utils.dtensor import Holding, hold, is_sharded, local
from gradbal.distributed.collectives import OWNER, Link
from gradbal.distributed.counts import Counts, read_counts, samples_of
from gradbal.distributed.fingerprint import digest, fingerprint, hashed
from gradbal.distributed.gradient_averages import Averaging
from gradbal.distributed.layout import Columns, RowStorage
from gradbal.distributed.processes import ALONE, Key, Known, MakePlans, Names, Processes, Settled
from gradbal.distributed.row_averages import Exchange, NoExchange
from gradbal.graph.heads_and_trunk import Plan
from gradbal.graph.losses import Batch, Losses, named_losses, placeholder, read_batch

SMALL = 2**14  # columns up to which one message with whole rows costs less than many with parts


class Several(Processes):
    """Several processes: replicas, shards, or both.

    Losses are means over the samples of a process. The gradient of each task is that of the
    mean over all samples: every process takes down its losses times its share of the samples
    times the number of processes, and what arrives is averaged, as DDP and FSDP do it.

    Args:
        link: The connection.
        whole: Whether every process needs all of the rows, and not a part of them.
    """

    def __init__(self, link: Link, *, whole: bool) -> None:
        self.link, self.size, self.whole = link, link.size, whole
        self.params: list[Tensor] = []
        self.shards = False
        self.factors: dict[int, float] = {}
        self.told: Exception | None = None
        self.holdings: list[Holding] = []

    def join(self, params: Sequence[Tensor]) -> None:
        if list(map(id, params)) == list(map(id, self.params)):
            return
        holdings = [hold(param, self.size) for param in params]
        row = [len(params), *(number for p in params for number in fingerprint(p))]
        table = self.link.table(torch.tensor([len(row)]))
        same = bool((table == table[0]).all())
        other = self.link.differing(torch.tensor(row)) if same else [0]
        if other:
            n = other[0] - 1
            what = f"parameter {n // 2}" if n >= 0 else "their number"
            raise RuntimeError(
                f"{OWNER}: the parameters of the {self.size} processes are no replicas: {what} "
                "differs; start all from the same state (DistributedDataParallel does that), or "
                "pass process_group=None if each process trains a model of its own."
            )
        self.params, self.holdings = list(params), holdings
        self.shards = any(is_sharded(param) for param in params)
        self.averaging = Averaging(self.link, self.params, self.holdings)

    def holding(self, number: int) -> Holding:
        return self.holdings[number]

    def rows(self, blocks: Sequence[RowStorage], n_tasks: int) -> NoExchange:
        return Exchange(self.link, blocks, n_tasks, self.params)

    def columns(self, n: int, holding: Holding) -> Columns:
        if not holding.averaged:
            return Columns(n, copies=holding.copies)
        if self.whole or n < SMALL:
            return Columns(n, copies=self.size)
        width = -(-n // self.size) * self.size
        return Columns(width, self.link.part(width), in_parts=True)

    def meet(
        self,
        core: Names,
        losses: Losses,
        counts: Counts | None,
        point: Callable[[], str],
        aux: Batch | None,
    ) -> Batch:
        self.link.mark()
        here = point()
        error: Exception | None = None
        batch, given = Batch([], [], torch.empty(0), torch.empty(0)), {}
        while True:
            grown: tuple[Sequence[str] | None, int] | None = None
            try:
                nothing = isinstance(losses, Mapping) and not losses
                names, found = ([], []) if nothing else named_losses(losses)
                if not core.names or set(names or ()) - {*core.names}:
                    grown = (names, len(found))
                else:
                    numbers = core.number_tasks(names, len(found))
                    given = read_counts(counts, names, numbers)
                    batch = read_batch(found, numbers)
            except (TypeError, ValueError) as caught:
                error = caught
            header = [1 if error else 2 if grown else 0, hashed(here), 0 if counts is None else 1]
            header += [aux is not None, *samples_of(batch, given, len(core.names))]
            table = self.link.table(torch.tensor(header, dtype=torch.float64))
            if (table[:, 0] == 1).any():
                self._raise_together(error)
            if (table[:, 0] == 2).any():
                self._grow(core, grown)
                continue
            self._check_points(table, here)
            return self._joined(batch, table[:, 4:], aux, table[:, 3])

    def _grow(self, core: Names, wanted: tuple[Sequence[str] | None, int] | None) -> None:
        """Make room for what any process has, in the same order everywhere."""
        for other in self.link.objects(wanted):
            if other is not None:
                core.number_tasks(*other)

    def _check_points(self, table: Tensor, point: str) -> None:
        """Raise if the processes are not doing the same."""
        if (table[:, 1] != table[0, 1]).any():
            where = self.link.objects(point)
            raise RuntimeError(
                f"{OWNER}: the processes are not at the same point of the training: process "
                + "; process ".join(f"{i} {text}" for i, text in enumerate(where))
                + "; call the optimizer alike in all of them."
            )
        if (table[:, 2] != table[0, 2]).any():
            raise ValueError(
                f"{OWNER}: `counts` was given in some processes only; give it in all, or in none."
            )

    def _joined(self, batch: Batch, samples: Tensor, aux: Batch | None, has_aux: Tensor) -> Batch:
        """Return the losses of the tasks that are present anywhere, with shares of samples."""
        present, size, rank = samples > 0, self.size, self.link.rank
        total = samples.clamp(min=0).sum(dim=0)
        tasks = present.any(dim=0).nonzero().flatten().tolist()
        if self.shards:
            self._check_shards(samples[:, tasks])
        self.even = bool((present == present[0]).all() and (has_aux == has_aux[0]).all())
        if aux is not None:
            aux.share([size / float(has_aux.sum())] * len(aux.tasks), size)
        shares = [max(0.0, float(samples[rank, task] * size / total[task])) for task in tasks]
        self.factors = {t: share / size for t, share in zip(tasks, shares, strict=True)}
        here = dict(zip(batch.tasks, batch.losses, strict=True))
        device = batch.values.device if batch.tasks else self._device()
        losses = [
            here[task] if share or self.shards else placeholder(device)
            for task, share in zip(tasks, shares, strict=True)
        ]
        whole = read_batch(losses, tasks)
        whole.share(shares, size)
        return whole

    def _check_shards(self, samples: Tensor) -> None:
        """Raise if a process has no loss where others do: shards are only reduced by all."""
        absent = (samples < 0).any(dim=1).nonzero().flatten().tolist()
        if absent:
            raise RuntimeError(
                f"{OWNER}: process {', '.join(map(str, absent))} has no loss of a task that others "
                "have, and parameters sharded by fully_shard are gathered and reduced by all "
                "processes together; compute the loss there on any samples, with a count of 0 in "
                "`counts`."
            )

    def _device(self) -> torch.device:
        return local(self.params[0]).device if self.params else torch.device("cpu")

    def plan(self, make: MakePlans, known: Known) -> list[Plan]:
        error: Exception | None = None
        plans: list[Plan] = []
        try:
            plans = make(known)
        except (ValueError, TypeError, RuntimeError) as caught:
            error = caught
        met = [(sorted(plan.reached.items()), sorted(plan.sparse)) for plan in plans]
        built = [(plan.trunk, plan.above, plan.own) for plan in plans]
        row = [error is not None, hashed(repr(met)), hashed(repr(built))]
        table = self.link.table(torch.tensor(row, dtype=torch.float64))
        if table[:, 0].any():
            self._raise_together(error)
        self.even &= bool((table[:, 2] == table[0, 2]).all())
        if (table[:, 1] == table[0, 1]).all():
            return plans
        everyone = self.link.objects(met)
        known = {**known}
        for number, tasks in (pair for one in everyone for reached, _ in one for pair in reached):
            known[number] = known.get(number, 0) | tasks
        plans = make(known)
        for i, plan in enumerate(plans):
            for one in everyone:
                reached, sparse = one[i]
                plan.sparse.update(sparse)
                for number, tasks in reached:
                    plan.reached[number] = plan.reached.get(number, 0) | tasks
        return plans

    def first(self, number: int) -> int:
        return int(self.link.table(torch.tensor([number]))[0, 0])

    def beside(self, aux: Batch | None) -> Tensor | None:
        return torch.zeros(1) if aux is None else aux.values.sum()[None]

    def sum(self, vector: Tensor) -> Tensor:
        return self.link.sum_small(vector)

    def all(self, good: bool) -> bool:
        return bool(self.link.table(torch.tensor([good])).all())

    def same(self, text: str) -> bool:
        return not self.link.differing(torch.tensor([hashed(text)], dtype=torch.float64))

    def total(
        self, numbers: Sequence[int], part: Callable[..., Tensor], rows: Sequence[Tensor]
    ) -> Tensor:
        kinds: dict[int, list[Tensor]] = {}
        for number, row in zip(numbers, rows, strict=True):
            kinds.setdefault(self.holdings[number].copies, []).append(row)
        if list(kinds) == [self.size]:
            return part(rows)
        found = torch.stack([part(some) / copies for copies, some in kinds.items()]).sum(dim=0)
        return self.sum(found.flatten()).view_as(found)

    def settle(self, grads: Mapping[Key, Tensor], marks: Collection[Key]) -> Settled:
        return self.averaging.settle(grads, marks)

    def watch(self) -> AbstractContextManager[None]:
        return self.averaging.watch()

    def complete(self) -> None:
        self.averaging.complete()

    def where(self, bad: bool) -> str:
        ranks = self.link.table(torch.tensor([bad])).nonzero()[:, 0].tolist()
        return f" (in process {', '.join(map(str, ranks))})" if ranks else ""

    def compare(self, things: Mapping[str, Tensor | str]) -> None:
        names = list(things)
        row = [
            int(hashed(thing)) if isinstance(thing, str) else digest(thing)
            for thing in things.values()
        ]
        table = self.link.table(torch.tensor(row))
        for rank, other in enumerate(table):
            for position in (other != table[0]).nonzero().flatten().tolist():
                raise RuntimeError(
                    f"check: {names[position]} is not the same in process {rank} as in process 0; "
                    "start all processes from one state, and call the optimizer alike in all."
                )

    def leave_word(self, error: BaseException) -> None:
        if error is not self.told:
            self.link.leave_word(error)

    @contextmanager
    def telling(self, core: Names) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if error is not self.told:
                self.link.mark()
                with suppress(RuntimeError):  # the user's own error is the one to be seen
                    self.link.table(torch.tensor([1.0, *[0.0] * (3 + len(core.names))]).double())
                    self._tell(error)
            raise

    def joined(self, core: Names, tasks: list[int], values: Tensor) -> tuple[list[int], Tensor]:
        self.link.mark()
        row = torch.zeros(4 + len(core.names), dtype=torch.float64)
        for task, value in zip(tasks, values.tolist(), strict=True):
            row[4 + task] = value * self.factors.get(task, 0.0)
        table = self.link.table(row)
        if table[:, 0].any():
            self._raise_together(None)
        found = list(self.factors)
        return found, table[:, 4:].sum(dim=0)[found].to(values.device)

    def _raise_together(self, error: Exception | None) -> None:
        """Raise everywhere what was caught in one process."""
        told = self._tell(error)
        rank = next(rank for rank, text in enumerate(told) if text is not None)
        self.told = error or RuntimeError(
            f"{OWNER}: process {rank} failed, so all of them broke off this step; there it said "
            f"{told[rank]}"
        )
        raise self.told

    def _tell(self, error: Exception | None) -> list[str | None]:
        """Exchange errors in words."""
        return self.link.objects(None if error is None else f"{type(error).__name__}: {error}")


def connect(given: Any, now: Processes, *, whole: bool) -> Processes:
    """Return the processes that balance their losses together.

    Args:
        given: ``"auto"`` for all there are, a group, or None for this process alone.
        now: Those of the step before; kept if they are the same.
        whole: Whether the rule needs all of the rows in every process.

    Raises:
        ValueError: If this process is no member of the group.
    """
    if given is None or not dist.is_available() or not dist.is_initialized():
        return ALONE
    group = dist.group.WORLD if isinstance(given, str) else given
    if isinstance(now, Several) and now.link.group is group:
        return now
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{OWNER}: process {dist.get_rank()} is no member of `process_group`; build the "
            "optimizer with a group that it belongs to."
        )
    return ALONE if dist.get_world_size(group) == 1 else Several(Link(group), whole=whole)
