"""Names for the parts of a step, for a profiler."""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd.profiler import record_function

from gradbal._utils import torch_private

_UNNAMED: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Name a part of the step in a profiler's trace; costs next to nothing where none runs."""
    if torch_private.profiler_enabled():
        return record_function(f"gradbal::{name}")
    return _UNNAMED
