"""Averages of gradients over processes, many in one message."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gradbal._utils.dtensor import Holding
from gradbal.distributed.collectives import Link
from gradbal.distributed.ddp import Reduced
from gradbal.distributed.fingerprint import hashed
from gradbal.distributed.processes import Key, Settled
from gradbal.distributed.row_averages import sum_sparse

BUCKET = 2**22  # entries that are averaged in one message


class Averaging:
    """Average the gradients of parameters that all processes hold; those of shards come averaged.

    Args:
        link: The connection.
        params: All parameters.
        holdings: How each is spread.
    """

    def __init__(self, link: Link, params: Sequence[Tensor], holdings: Sequence[Holding]) -> None:
        self.link, self.size = link, link.size
        self.params, self.holdings = params, holdings
        self.reduced = Reduced(link.differing)

    def settle(self, grads: Mapping[Key, Tensor], marks: Collection[Key]) -> Settled:
        """Average gradients over the processes; where one has none it counts as zero."""
        sparse = [key for key, grad in grads.items() if grad.is_sparse]
        keys, marked, thin = map(sorted, (grads, marks, sparse))
        if self.link.differing(torch.tensor([hashed(repr((keys, marked, thin)))]).double()):
            found = zip(*self.link.objects((keys, marked, thin)), strict=True)
            keys, marked, thin = (sorted({key for one in part for key in one}) for part in found)
        whole = {key: grads[key] for key in keys if key in grads}
        plain = [key for key in keys if self.holdings[key[1]].averaged]
        for key in thin:
            whole[key] = sum_sparse(self.link, grads.get(key), self.params[key[1]]) / self.size
        self._average([key for key in plain if key not in set(thin)], grads, whole)
        return Settled({key: whole[key] for key in keys if key in whole}, {*marked})

    def _average(
        self, keys: Sequence[Key], grads: Mapping[Key, Tensor], out: dict[Key, Tensor]
    ) -> None:
        """Average dense gradients, many in one message."""
        kinds: dict[object, list[Key]] = {}
        for key in keys:
            param = self.params[key[1]]
            kinds.setdefault((param.dtype, param.device), []).append(key)
        waiting = []
        for bucket in (part for kind in kinds.values() for part in self._buckets(kind)):
            like = [self.params[number] for _, number in bucket]
            given = [grads.get(key) for key in bucket]
            parts = [
                torch.zeros_like(param).flatten() if grad is None else _dense(grad).flatten()
                for grad, param in zip(given, like, strict=True)
            ]
            flat = torch.cat(parts)
            waiting.append((bucket, like, flat, self.link.sum_large(flat, "gradients")))
        for bucket, like, flat, transfer in waiting:
            transfer.finish()
            flat /= self.size
            pieces = torch.split(flat, [param.numel() for param in like])
            for key, piece, param in zip(bucket, pieces, like, strict=True):
                out[key] = piece.view(param.shape)

    def _buckets(self, keys: Sequence[Key]) -> list[list[Key]]:
        buckets: list[list[Key]] = [[]]
        room = BUCKET
        for key in keys:
            if room <= 0:
                buckets.append([])
                room = BUCKET
            buckets[-1].append(key)
            room -= self.params[key[1]].numel()
        return buckets

    def watch(self) -> AbstractContextManager[None]:
        """Notice what others do to the gradients of an ordinary backward pass."""
        plain = {n: p for n, p in enumerate(self.params) if self.holdings[n].averaged}
        return self.reduced.watch(plain)

    def complete(self) -> None:
        """Average the gradients of that pass that nobody else has averaged."""
        missing = self.reduced.missing()
        if not missing:
            return
        grads = {n: self.params[n].grad for n in missing}
        found = self.settle({(0, n): g for n, g in grads.items() if g is not None}, ()).grads
        for (_, number), grad in found.items():
            old = grads[number]
            if old is None or old.is_sparse:
                self.params[number].grad = grad
            else:
                old.copy_(grad)


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad
