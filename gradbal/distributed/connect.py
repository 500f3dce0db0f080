"""From the argument ``process_group`` to the processes that it means."""

from typing import Any

import torch.distributed as dist

from gradbal.distributed.link import OWNER, Link
from gradbal.distributed.processes import Processes
from gradbal.distributed.several import Several

ALONE = Processes()


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
