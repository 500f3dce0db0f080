"""ESMM and ESCM²: click and conversion over all impressions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.decoders import Decoded, Decoder
from arch_zoo.encoders import Encoder
from arch_zoo.hps import HPS

NAMES = ("ctr", "cvr", "ctcvr")


class ESMMDecoder(Decoder):
    r"""Logits of click, conversion after a click, and their product.

    With logits `a` of a click and `b` of a conversion after it, the output of the product is the
    logit of :math:`\sigma(a) \sigma(b)`, computed from logarithms, so that it does not saturate.

    Args:
        click: Tower of the click, from its stream to one logit.
        conversion: Tower of the conversion after a click.
        names: Names of click, conversion and product.
        detach_click: Send no gradient of the product into the click's tower.
        train_conversion: Make the conversion a task of its own, for a loss such as
            :func:`counterfactual_loss`; without, it is an output that has no loss.
        imputation: Tower of the error of the conversion, for the doubly robust loss; its output is
            called ``"imputation"`` and has no loss of its own.
    """

    def __init__(
        self,
        click: nn.Module,
        conversion: nn.Module,
        *,
        names: Sequence[str] = NAMES,
        detach_click: bool = False,
        train_conversion: bool = False,
        imputation: nn.Module | None = None,
    ) -> None:
        if len(set(names)) != 3 or "imputation" in names:
            raise ValueError(
                "ESMM: `names` must be three different ones of click, conversion and product, none "
                f"of them 'imputation', got {tuple(names)}."
            )
        self.names = tuple(names)
        ctr, cvr, ctcvr = self.names
        super().__init__((ctr, cvr, ctcvr) if train_conversion else (ctr, ctcvr), (ctr, cvr))
        self.detach_click = detach_click
        self.click, self.conversion, self.imputation = click, conversion, imputation

    def sources(self, task: str) -> tuple[str, ...]:
        ctr, cvr, ctcvr = self.names
        return (ctr, cvr) if task == ctcvr else (task,)

    def gradients(self, task: str) -> tuple[str, ...]:
        _, cvr, ctcvr = self.names
        return (cvr,) if task == ctcvr and self.detach_click else self.sources(task)

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        ctr, cvr, ctcvr = self.names
        yield self.click, (ctr,) if self.detach_click else (ctr, ctcvr)
        yield self.conversion, (cvr, ctcvr) if cvr in self.tasks else (ctcvr,)
        if self.imputation is not None:
            yield self.imputation, (cvr,)

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        ctr, cvr, ctcvr = self.names
        outputs: dict[str, Tensor] = {}
        if ctr in tasks or ctcvr in tasks:
            click = self.click(streams[ctr])
            outputs |= {ctr: click} if ctr in tasks else {}
        if cvr in tasks or ctcvr in tasks:
            conversion = self.conversion(streams[cvr])
            outputs[cvr] = conversion
        if ctcvr in tasks:
            first = click.detach() if self.detach_click else click
            outputs[ctcvr] = product_logit(first, conversion)
        if self.imputation is not None and cvr in tasks:
            outputs["imputation"] = self.imputation(streams[cvr])
        return Decoded(outputs)


class ESMM(HPS):
    r"""Entire-space multi-task model: click, and click times conversion, on all impressions.

    ``model(batch)`` returns logits: ``"ctr"`` and ``"ctcvr"`` are the tasks, each with binary cross
    entropy on all impressions, against clicks and against clicks that convert; ``"cvr"`` is what
    they teach, the conversion after a click, and has no loss. Pass :class:`ESMMDecoder` as the
    heads of :class:`arch_zoo.MMoE` or others for another encoder than a shared one.

    Args:
        encoder: The shared embedding, which reads the batch.
        click: Tower of the click, from the embedding to one logit.
        conversion: Tower of the conversion after a click.
        options: Those of :class:`ESMMDecoder`.

    Raises:
        TypeError: If the encoder is none.
        ValueError: If the names are not three.

    Source:
        Ma et al., Entire Space Multi-Task Model, SIGIR 2018, equation 3, in logarithms.

    Example:
        >>> towers = nn.Linear(8, 1), nn.Linear(8, 1)
        >>> model = ESMM(nn.Linear(4, 8), *towers)
        >>> list(model(torch.zeros(5, 4)))
        ['ctr', 'ctcvr', 'cvr']
        >>> sorted(model.parameter_task_sets()["heads.click.weight"])
        ['ctcvr', 'ctr']
    """

    def __init__(
        self,
        encoder: Encoder,
        click: nn.Module,
        conversion: nn.Module,
        **options: Any,  # of the decoder
    ) -> None:
        super().__init__(encoder, ESMMDecoder(click, conversion, **options))


class ESCM2(ESMM):
    r"""ESMM with a third task, the conversion after a click, whose loss is corrected for selection.

    The tasks are ``"ctr"``, ``"cvr"`` and ``"ctcvr"``; the loss of the second is
    :func:`counterfactual_loss`. With an imputation tower it may be doubly robust.

    Args:
        encoder: As in :class:`ESMM`.
        click: As there.
        conversion: As there.
        imputation: Tower of the conversion's error, from the embedding to one number, or None.
        options: Those of :class:`ESMMDecoder`.

    Source:
        Wang et al., ESCM²: Entire Space Counterfactual Multi-Task Model, SIGIR 2022.

    Example:
        >>> towers = nn.Linear(8, 1), nn.Linear(8, 1)
        >>> ESCM2(nn.Linear(4, 8), *towers).tasks
        ('ctr', 'cvr', 'ctcvr')
    """

    def __init__(
        self,
        encoder: Encoder,
        click: nn.Module,
        conversion: nn.Module,
        imputation: nn.Module | None = None,
        **options: Any,  # of the decoder
    ) -> None:
        super().__init__(
            encoder, click, conversion, train_conversion=True, imputation=imputation, **options
        )


def product_logit(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the logit of :math:`\sigma(a) \sigma(b)`.

    Example:
        >>> p = torch.sigmoid(product_logit(torch.tensor(0.0), torch.tensor(0.0)))
        >>> round(p.item(), 6)
        0.25
    """
    yes = functional.logsigmoid(a) + functional.logsigmoid(b)
    no = torch.logaddexp(
        functional.logsigmoid(-a), functional.logsigmoid(a) + functional.logsigmoid(-b)
    )
    return yes - no


def counterfactual_loss(
    outputs: Mapping[str, Tensor],
    clicks: Tensor,
    conversions: Tensor,
    *,
    method: str = "ips",
    least: float = 0.05,
    names: Sequence[str] = NAMES,
) -> Tensor:
    r"""Return the loss of conversions after a click, corrected for which impressions are clicked.

    With errors :math:`e` of the clicked, clicks :math:`c` and propensities :math:`\hat p`, the
    click's own probability without gradient: ``"ips"`` is the mean of :math:`c e / \hat p`,
    ``"snips"`` its sum over that of :math:`c / \hat p`, and ``"dr"`` the mean of
    :math:`\hat e + c (e - \hat e) / \hat p`, plus that of :math:`c (e - \hat e)^2 / \hat p`, which
    teaches the imputed error :math:`\hat e`. Without any click the first two are 0.

    Args:
        outputs: Of :class:`ESCM2`, logits of any one shape.
        clicks: 1 where an impression was clicked, of that shape.
        conversions: 1 where a click converted.
        method: One of the three.
        least: Propensities are at least this; above 0, at most 1.
        names: Names of click, conversion and product.

    Raises:
        ValueError: If the method is none of these, needs an imputation that is missing, or an
            impression converts without a click.

    Example:
        >>> outputs = {"ctr": torch.zeros(2), "cvr": torch.zeros(2)}
        >>> loss = counterfactual_loss(outputs, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        >>> round(loss.item(), 4)  # log 2, once in two impressions, each seen half as often
        0.6931
    """
    if method not in ("ips", "snips", "dr") or (method == "dr" and "imputation" not in outputs):
        raise ValueError(
            "counterfactual_loss: `method` must be 'ips', 'snips', or 'dr' for a model with an "
            f"imputation tower, got {method!r}."
        )
    if not torch.compiler.is_compiling() and bool((conversions > clicks).any()):
        raise ValueError(
            "counterfactual_loss: `conversions` must be 0 where `clicks` is, got one without a "
            "click."
        )
    ctr, cvr, _ = names
    weights = clicks / torch.sigmoid(outputs[ctr].detach()).clamp(min=least)
    errors = functional.binary_cross_entropy_with_logits(
        outputs[cvr], conversions, reduction="none"
    )
    if method == "ips":
        return (weights * errors).mean()
    if method == "snips":
        return (weights * errors).sum() / weights.sum().clamp(min=1)
    gap = errors - outputs["imputation"]
    robust = (outputs["imputation"] + weights * gap).mean()
    return robust + (weights * (errors.detach() - outputs["imputation"]).square()).mean()
