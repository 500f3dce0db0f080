"""Hard parameter sharing: one encoder for all tasks."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from arch_zoo.encoders import Encoder, module_of
from arch_zoo.model import Features, Inputs, MultiTaskModel, Reach


class HPS(MultiTaskModel):
    r"""Every head reads the same features: :math:`y_t = h_t(f(x))`.

    With one batch per task the encoder runs once per batch, so its norm layers see, and count, the
    batches one by one.

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

    def __init__(self, encoder: Encoder, heads: Mapping[str, nn.Module]) -> None:
        super().__init__(heads)
        self.encoder = module_of(self._owner, "encoder", encoder)

    def encode(self, x: Inputs, tasks: Sequence[str] | None = None) -> Features:
        return self.by_batch(self._encode, tasks, x)

    def reach(self) -> Reach:
        yield self.encoder, self.tasks

    def _encode(self, tasks: tuple[str, ...], x: Tensor) -> Features:
        z = self.encoder(x)
        return Features(shared=(z,), per_task=dict.fromkeys(tasks, z), aux={})
