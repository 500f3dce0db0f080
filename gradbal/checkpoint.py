"""The form in which a core is saved."""

from collections.abc import Mapping
from typing import Any

from gradbal.trees import cloned

VERSION = 1
KEYS = ("version", "rule", "tasks", "step", "generator", "state", "pending", "choice")


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
