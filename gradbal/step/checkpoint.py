"""The form in which a core is saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradbal._utils.dtensor import part_of, whole_of
from gradbal._utils.log import log
from gradbal.rules._base import mix
from gradbal.rules._state import new_state
from gradbal.step.accumulate import Pending
from gradbal.step.trees import cloned

VERSION = 1
KEYS = ("version", "rule", "tasks", "step", "generator", "state", "pending", "choice")


def contents(core: Any) -> dict[str, Any]:  # a Core; this module lies below it
    """Return all that a core must remember, in sections.

    Raises:
        RuntimeError: If every process has only its own part of it.
    """
    if core.pending and core.n_processes > 1:
        raise RuntimeError(
            "Checkpoint: gradients were put aside with `accumulate`, and each process has its own; "
            "save after the step that uses them, or call `discard()` first."
        )
    tasks = {"names": core.names, "numbered": core.numbered, "sets": core.sets}
    step = {"solved": int(core.solved), "skipped": core.skipped, "age": int(core.age)}
    buffers = {
        number: {
            name: whole_of(tensor, core.shards.get(number), len(core.row_axes[name]))
            for name, tensor in kept.items()
        }
        for number, kept in core.buffers.items()
    }
    state = {"groups": core.state, "buffers": buffers, "held": core.held, "slopes": core.slopes}
    parts = core.pending
    pending = {"rows": parts.rows, "losses": parts.losses, "aux": parts.aux}
    waiting = {"decided": sorted(core.decided), "awaiting": sorted(core.awaiting)}
    device = str(core.generator.device)
    generator = {"seed": core.seed, "device": device, "state": core.generator.get_state()}
    return {
        "version": VERSION,
        "rule": core.rule.kind,
        "tasks": cloned(tasks),
        "step": {**step, "epoch": core.epoch.clone()},
        "generator": generator,
        "state": cloned(state),
        "pending": {**cloned(pending), **waiting},
        "choice": cloned(core.choice),
    }


def check_tasks(core: Any, state_dict: Mapping[str, Any]) -> None:
    """Raise if a checkpoint was written for other tasks than were announced.

    Raises:
        ValueError: If so.
    """
    names = opened(state_dict)["tasks"]["names"]
    if core.announced and names and names != core.names:
        raise ValueError(
            f"Checkpoint: expected the tasks in `tasks=`, {', '.join(core.names)}, got "
            f"{', '.join(names)}; load it into an optimizer with these tasks, or without `tasks=`."
        )


def restore(core: Any, state_dict: Mapping[str, Any]) -> None:
    """Let a core remember what another one did, see :func:`contents`."""
    loaded = opened(state_dict)
    tasks, step, generator = loaded["tasks"], loaded["step"], loaded["generator"]
    state, pending = loaded["state"], loaded["pending"]
    core.names, core.numbered, core.sets = tasks["names"], tasks["numbered"], tasks["sets"]
    core.solved, core.age = core.count(step["solved"]), core.count(step["age"])
    core.skipped, core.epoch, core.seed = step["skipped"], step["epoch"], generator["seed"]
    core.generator = _generator(generator, step["solved"])
    core.state = {group: _fitting(core, kept) for group, kept in state["groups"].items()}
    core.held, core.slopes = state["held"], state["slopes"]
    core.buffers = {
        number: {
            name: part_of(tensor, core.shards.get(number), len(core.row_axes[name]))
            for name, tensor in kept.items()
        }
        for number, kept in state["buffers"].items()
    }
    core.pending = Pending(pending["rows"], pending["losses"], pending["aux"])
    core.decided, core.awaiting = set(pending["decided"]), set(pending["awaiting"])
    core.choice = loaded["choice"]


def _fitting(core: Any, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is kept for a group, without what another learner remembers.

    An earlier release stepped some learned tensors by Adam; their values go on, and what the
    learner of today remembers begins anew.
    """
    if not kept or kept.keys() == core.axes.keys():
        return dict(kept)
    lost = sorted(kept.keys() - core.axes.keys())
    if lost:
        log.warning(
            "The checkpoint holds moments of another learner (%s); the learned values go on, and "
            "the moments begin anew.",
            ", ".join(lost),
        )
    n_tasks = len(core.names)
    device = next(iter(kept.values())).device
    fresh = new_state(core.rule, core.learner, n_tasks, device)
    return {name: kept.get(name, tensor) for name, tensor in fresh.items()}


def _generator(saved: Mapping[str, Any], step: int) -> torch.Generator:
    """Return the generator as it was saved, or another one if its device is not there."""
    try:
        generator = torch.Generator(saved["device"])
        generator.set_state(saved["state"].cpu())
    except RuntimeError:
        log.warning(
            "The checkpoint's random numbers were drawn on %s, which this process does not have; "
            "the rule goes on with other numbers, from its seed and the number of steps.",
            saved["device"],
        )
        return torch.Generator().manual_seed(mix(saved["seed"], step))
    return generator


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Make every section a tuple of one.

    ``torch.distributed.checkpoint`` takes a tuple as one value, while of a dict it would fill only
    what a fresh object has already.
    """
    return {key: (part,) if isinstance(part, dict) else part for key, part in contents.items()}


def opened(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with the sections open."""
    parts = {key: v[0] if isinstance(v, tuple) else v for key, v in state_dict.items()}
    found: dict[str, Any] = cloned(parts)
    return found


def verify(state_dict: Mapping[str, Any], rule: str) -> None:
    """Say whether a checkpoint fits.

    Raises:
        ValueError: If it was written by a newer version or for another rule.
    """
    keys = set(state_dict) if isinstance(state_dict, Mapping) else set()
    missing = sorted(set(KEYS) - keys)
    if missing:
        raise ValueError(
            "Checkpoint: expected what `core.state_dict()` gave, but there is no "
            f"{', '.join(missing)}; load a checkpoint of this optimizer."
        )
    if state_dict["version"] > VERSION:
        raise ValueError(
            f"Checkpoint: written by version {state_dict['version']} of the state, this release "
            f"reads up to {VERSION}; install a newer gradbal."
        )
    if state_dict["rule"] != rule:
        raise ValueError(
            f"Checkpoint: holds the state of the rule {state_dict['rule']}, this optimizer has "
            f"{rule}; build it with the same rule."
        )
