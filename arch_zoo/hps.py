"""Hard parameter sharing: one encoder for all tasks."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from arch_zoo.encoders import Encoder, module_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.tensors import leaves_of, views_of


class HPS(MultiTaskModel):
    r"""Every head reads the same features: :math:`y_t = h_t(f(x))`.

    Features may be any structure of tensors, such as a pyramid of maps; ``Features.shared`` holds
    its tensors. With one batch per task the encoder runs once per batch, so its norm layers see,
    and count, the batches one by one.

    Args:
        encoder: The shared encoder: a module, a list of stages, or a factory.
        heads: One module per task, which reads the encoder's output.

    Raises:
        TypeError: If the encoder is none of these.
        ValueError: If the heads name no task, or one that cannot name a submodule.

    Source:
        Caruana, Multitask Learning, Machine Learning 28, 1997.

    Example:
        >>> import torch
        >>> model = HPS(nn.Linear(4, 8), {"click": nn.Linear(8, 1), "buy": nn.Linear(8, 2)})
        >>> {task: tuple(y.shape) for task, y in model(torch.zeros(5, 4)).items()}
        {'click': (5, 1), 'buy': (5, 2)}
        >>> sorted(model.parameter_task_sets()["encoder.weight"])
        ['buy', 'click']
    """

    def __init__(self, encoder: Encoder, heads: Heads) -> None:
        super().__init__(heads)
        self.encoder = module_of(self._owner, "encoder", encoder)

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def reach(self) -> Reach:
        yield self.encoder, self.streams

    def receivers(self) -> Iterator[nn.Module]:
        yield self.encoder

    def _encode(self, streams: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        z = call(self.encoder, x, named)
        if not isinstance(z, Tensor):
            z = views_of(z)  # parts of it may lie on the way to others
        return Features(shared=leaves_of(z), per_task=dict.fromkeys(streams, z), aux={})
