"""Processes on this machine, connected by gloo: one pool per size for the whole run."""

import datetime
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60  # seconds until a process that waits for another gives up


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def connect(rank: int, size: int, port: int, timeout: float) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in places.items()})  # as torchrun does
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def serve(rank: int, size: int, port: int, timeout: float, pipe: Connection) -> None:
    """Do what comes through the pipe until it is closed."""
    connect(rank, size, port, timeout)
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(*args, **options)))
        except Exception as error:  # whatever it is, the parent must hear of it
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class Failed(AssertionError):
    """A worker raised; the message has the traceback."""


class Pool:
    """So many processes, each of which calls a function when asked to.

    Args:
        size: How many.
        timeout: Seconds until a process that waits for another gives up.
    """

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.broken = False
        context, port = mp.get_context("spawn"), free_port()
        pairs = [context.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pairs]
        self.workers = [
            context.Process(target=serve, args=(rank, size, port, timeout, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for worker in self.workers:
            worker.start()
        for _, theirs in pairs:
            theirs.close()

    def outcomes(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Call a function in every process; a failure is a triple of kind, words and traceback.

        A process that is gone gives None.
        """
        for pipe in self.pipes:
            pipe.send((function, args, options))
        found = []
        for pipe in self.pipes:
            try:
                found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                found.append((False, None))
        return found

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Call a function in every process and return what it returns, by rank."""
        found = self.outcomes(function, *args, **options)
        bad = [f"process {rank}:\n{what[2]}" for rank, (ok, what) in enumerate(found) if not ok]
        if bad:
            self.broken = True
            raise Failed("\n".join(bad))
        return [what for _, what in found]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for worker in self.workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()


class Pools:
    """Pools by size, started when they are first asked for, and anew once a call has failed."""

    def __init__(self) -> None:
        self.found: dict[int, Pool] = {}

    def __getitem__(self, size: int) -> Pool:
        if size in self.found and self.found[size].broken:
            self.found.pop(size).close()
        if size not in self.found:
            self.found[size] = Pool(size)
        return self.found[size]

    def close(self) -> None:
        for pool in self.found.values():
            pool.close()
