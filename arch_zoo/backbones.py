"""Stages of well-known backbones, found by class and attributes; no library is imported."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from arch_zoo.automtl.tracer import first_line
from arch_zoo.encoders import Chain
from arch_zoo.tensors import pooled


class Stages(NamedTuple):
    """A backbone in pieces: ``output(neck(parts[-1](... parts[0](x))))`` is its pooled features.

    Args:
        parts: The stages, the stem in the first one.
        neck: What the backbone does after its last stage and before pooling, such as a norm.
        output: Pooling, to vectors, without the classifier.
        layout: Axes of the features between stages.
        prefix: Number of tokens before those of the image, such as a class token.
    """

    parts: list[nn.Module]
    neck: nn.Module
    output: nn.Module
    layout: str
    prefix: int = 0


class Parts(NamedTuple):
    """A backbone as found, before stages are grouped."""

    stem: list[nn.Module]
    blocks: list[list[nn.Module]]
    neck: list[nn.Module]
    output: list[nn.Module]
    layout: str = "NCHW"
    prefix: int = 0


def stages(
    model: nn.Module,
    n: int | None = None,
    *,
    names: Sequence[str] = (),
    keep_stem: bool = False,
) -> Stages:
    """Cut a backbone into stages that share its modules and together compute what it computes.

    Known are ResNet, MobileNetV2 and V3, EfficientNet, ConvNeXt, Swin and ViT of torchvision and
    timm, and BERT, RoBERTa, GPT-2 and the encoder of T5 of transformers. Parts of text models take
    the named input ``attention_mask``, the first one ``input_ids`` as `x`. Any other network is cut
    after the modules that are named, if `torch.fx` can trace it; values that cross a cut beside the
    last one, such as the skips of a U-Net, go along in a tuple.

    Args:
        model: The backbone; its modules are used, not copied.
        n: Number of stages; by default those of the network, or 4 for a column of equal blocks.
            Blocks are put together as evenly as can be.
        names: Submodules after which to cut, in the order of their calls.
        keep_stem: Give the stem a stage of its own.

    Raises:
        ValueError: If the backbone is not known and no names are given, a name is not called, or
            there are fewer blocks than stages.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
        >>> [len(list(part.parameters())) for part in stages(net, names=["0", "1"]).parts]
        [2, 2, 2]
    """
    if names:
        return _by_names(model, names)
    for looks_like, take in KNOWN:
        if looks_like(model):
            found = take(model)
            break
    else:
        raise ValueError(
            f"stages: `model` must be a known backbone, got {type(model).__name__}. Name the "
            "submodules after which to cut, `stages(model, names=[...])`."
        )
    groups = _grouped(found.blocks, n)
    parts = [Chain(*group) for group in groups]
    if keep_stem:
        parts = [Chain(*found.stem), *parts]
    else:
        parts[0] = Chain(*found.stem, *groups[0])
    neck, output = Chain(*found.neck), Chain(*found.output)
    return Stages([*parts], neck, output, found.layout, found.prefix)


def _grouped(blocks: list[list[nn.Module]], n: int | None) -> list[list[nn.Module]]:
    """Put neighbours together until there are ``n`` groups, as even as can be."""
    n = len(blocks) if n is None else n
    if not 1 <= n <= len(blocks):
        raise ValueError(f"stages: `n` must be between 1 and {len(blocks)}, got {n}.")
    bounds = [len(blocks) * i // n for i in range(n + 1)]
    return [
        [module for block in blocks[start:stop] for module in block]
        for start, stop in pairwise(bounds)
    ]


class Slice(nn.Module):
    """A shallow copy of a module with some of its children and parameters, and a forward of ours.

    Args:
        model: What it is a part of.
        keep: Names of children and parameters.
        run: From the copy and the input to the output.
    """

    def __init__(self, model: nn.Module, keep: Collection[str], run: Callable[..., Any]) -> None:
        super().__init__()
        part = copy.copy(model)
        part._modules = {k: m for k, m in model._modules.items() if k in keep}
        part._parameters = {k: p for k, p in model._parameters.items() if k in keep}
        part._buffers = dict(model._buffers)
        self.part = part
        self.run = run

    def forward(self, x: Any) -> Any:
        return self.run(self.part, x)


def _has(*names: str) -> Callable[[nn.Module], bool]:
    return lambda model: all(hasattr(model, name) for name in names)


def _is(kind: str, *names: str, origin: str = "") -> Callable[[nn.Module], bool]:
    """Return a test for the name of a class, or of one of its bases, and for attributes."""

    def test(model: nn.Module) -> bool:
        bases = type(model).__mro__
        known = any(b.__name__ == kind and b.__module__.startswith(origin) for b in bases)
        return known and _has(*names)(model)

    return test


def _resnet(model: Any) -> Parts:
    act = model.act1 if hasattr(model, "act1") else model.relu
    pool = model.global_pool if hasattr(model, "global_pool") else model.avgpool
    blocks = [[model.layer1], [model.layer2], [model.layer3], [model.layer4]]
    return Parts([model.conv1, model.bn1, act, model.maxpool], blocks, [], [pool, nn.Flatten()])


def _features(model: Any) -> Parts:
    """MobileNet and EfficientNet of torchvision: cut before every block that strides."""
    stem, *middle, last = model.features
    blocks: list[list[nn.Module]] = []
    for block in middle:
        if not blocks or _strides(block):
            blocks.append([])
        blocks[-1].append(block)
    pool = model.avgpool if hasattr(model, "avgpool") else nn.AdaptiveAvgPool2d(1)
    return Parts([stem], blocks, [last], [pool, nn.Flatten()])


def _strides(block: nn.Module) -> bool:
    convs = (m for m in block.modules() if isinstance(m, nn.Conv2d))
    return any(max(conv.stride) > 1 for conv in convs)


def _pairs(model: Any) -> Parts:
    """ConvNeXt and Swin of torchvision: a stem, then blocks and downsampling in turn."""
    stem, first, *rest = model.features
    blocks = [[first], *([a, b] for a, b in zip(rest[::2], rest[1::2], strict=True))]
    if hasattr(model, "permute"):
        output = [model.permute, model.avgpool, model.flatten]
        return Parts([stem], blocks, [model.norm], output, "NHWC")
    norm, flatten, *_ = model.classifier  # the norm of ConvNeXt follows its pooling
    return Parts([stem], blocks, [], [model.avgpool, norm, flatten])


def _torchvision_vit(model: Any) -> Parts:
    encoder = model.encoder
    position = Slice(encoder, ("pos_embedding", "dropout"), _with_positions)
    stem = Slice(model, ("conv_proj", "class_token"), _with_class_token)
    blocks = [[layer] for layer in encoder.layers]
    return Parts([stem, position], _four(blocks), [encoder.ln], [First()], "NLC", 1)


def _with_class_token(model: Any, x: Tensor) -> Tensor:
    tokens: Tensor = model._process_input(x)
    return torch.cat([model.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)


def _with_positions(encoder: Any, x: Tensor) -> Tensor:
    y: Tensor = encoder.dropout(x + encoder.pos_embedding)
    return y


def _timm_efficientnet(model: Any) -> Parts:
    blocks = [[block] for block in model.blocks]
    stem = [model.conv_stem, model.bn1, *_maybe(model, "act1")]
    if hasattr(model, "norm_head"):  # MobileNetV3 pools before its last convolution
        output = [model.global_pool, model.conv_head, model.norm_head, model.act2, model.flatten]
        return Parts(stem, blocks, [], output)
    neck = [model.conv_head, model.bn2, *_maybe(model, "act2")]
    return Parts(stem, blocks, neck, [model.global_pool])


def _maybe(model: nn.Module, name: str) -> list[nn.Module]:
    found = getattr(model, name, None)
    return [found] if isinstance(found, nn.Module) else []


def _timm_convnext(model: Any) -> Parts:
    head = Slice(model, ("head",), _pre_logits)
    return Parts([model.stem], [[s] for s in model.stages], [model.norm_pre], [head])


def _pre_logits(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.forward_head(x, pre_logits=True)
    return y


def _timm_swin(model: Any) -> Parts:
    head = Slice(model, ("head",), _pre_logits)
    return Parts([model.patch_embed], [[s] for s in model.layers], [model.norm], [head], "NHWC")


def _timm_vit(model: Any) -> Parts:
    kept = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
    stem = Slice(model, (*kept, "cls_token", "reg_token", "pos_embed"), _timm_tokens)
    output = Slice(model, ("attn_pool", "fc_norm", "head_drop", "head"), _pre_logits)
    blocks = _four([[block] for block in model.blocks])
    return Parts([stem], blocks, [model.norm], [output], "NLC", int(model.num_prefix_tokens))


def _timm_tokens(model: Any, x: Tensor) -> Tensor:
    tokens = model._pos_embed(model.patch_embed(x))
    y: Tensor = model.norm_pre(model.patch_drop(tokens))
    return y


def _four(blocks: list[list[nn.Module]]) -> list[list[nn.Module]]:
    return _grouped(blocks, min(4, len(blocks)))


class First(nn.Module):
    """The first token of each sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class MaskedMean(nn.Module):
    """The mean over the tokens that the mask keeps."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return pooled(x, attention_mask, "NLC")


class Last(nn.Module):
    """The last token of each sequence that the mask keeps."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return x[:, -1]
        positions = torch.arange(x.shape[1], device=x.device)
        last = (positions * (attention_mask != 0)).argmax(dim=1)
        return x[torch.arange(x.shape[0], device=x.device), last]


class TextStem(nn.Module):
    """The embeddings of BERT: token ids to features.

    Args:
        embeddings: The module of the model.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids
        )
        return y


class TextBlock(nn.Module):
    """A transformer layer that takes a mask of tokens, as zeros and ones.

    Args:
        layer: Takes features and an additive mask ``[batch, 1, queries, keys]``.
        causal: Let tokens see none that come later.
        bias: Returns a position bias ``[1, heads, tokens, tokens]`` from their number, if there is.
    """

    def __init__(
        self, layer: nn.Module, causal: bool = False, bias: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.causal = causal
        self.bias = bias

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.bias is not None:
            added = self.bias(x.shape[1], x.device)
            if attention_mask is not None:
                added = added + _additive(attention_mask, x, False)
            y = self.layer(x, position_bias=added)
        elif attention_mask is None and not self.causal:
            y = self.layer(x)
        else:
            seen = x.new_ones(x.shape[:2]) if attention_mask is None else attention_mask
            y = self.layer(x, attention_mask=_additive(seen, x, self.causal))
        first: Tensor = y[0] if isinstance(y, tuple) else y
        return first


def _additive(mask: Tensor, x: Tensor, causal: bool) -> Tensor:
    """Return zero where a query may see a key and the lowest number elsewhere."""
    seen = (mask != 0)[:, None, None, :]
    if causal:
        length = x.shape[1]
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    lowest = torch.finfo(x.dtype).min
    return torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, lowest)


class PositionBias(nn.Module):
    """The position bias of T5, which all its blocks share.

    Args:
        attention: The attention of the first block, which computes it.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        keep = ("relative_attention_bias",)
        self.attention = Slice(attention, keep, _bias_of_length)

    def forward(self, length: int, device: torch.device) -> Tensor:
        y: Tensor = self.attention((length, device))
        return y


def _bias_of_length(attention: Any, given: tuple[int, torch.device]) -> Tensor:
    length, device = given
    y: Tensor = attention.compute_bias(length, length, device=device)
    return y


class TokenStem(nn.Module):
    """Embeddings of tokens, and of positions if there are any.

    Args:
        tokens: Embedding of token ids.
        positions: Embedding of positions, or None.
        dropout: After them.
    """

    def __init__(self, tokens: nn.Module, positions: nn.Module | None, dropout: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.dropout = dropout

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        y: Tensor = self.dropout(x)
        return y


def _bert(model: Any) -> Parts:
    blocks = _four([[TextBlock(layer)] for layer in model.encoder.layer])
    return Parts([TextStem(model.embeddings)], blocks, [], [First()], "NLC")


def _gpt2(model: Any) -> Parts:
    stem = TokenStem(model.wte, model.wpe, model.drop)
    blocks = _four([[TextBlock(layer, causal=True)] for layer in model.h])
    return Parts([stem], blocks, [model.ln_f], [Last()], "NLC")


def _t5(model: Any) -> Parts:
    stack = model.encoder
    stem = TokenStem(stack.embed_tokens, None, stack.dropout)
    bias = PositionBias(stack.block[0].layer[0].SelfAttention)
    blocks = _four([[TextBlock(block, bias=bias)] for block in stack.block])
    return Parts([stem], blocks, [stack.final_layer_norm, stack.dropout], [MaskedMean()], "NLC")


KNOWN: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Parts]], ...] = (
    (_is("ResNet", "conv1", "layer4", "maxpool"), _resnet),
    (_is("MobileNetV2", "features"), _features),
    (_is("MobileNetV3", "features"), _features),
    (_is("EfficientNet", "features"), _features),
    (_is("ConvNeXt", "features", "avgpool"), _pairs),
    (_is("SwinTransformer", "features", "permute"), _pairs),
    (_is("VisionTransformer", "conv_proj", "class_token"), _torchvision_vit),
    (_is("EfficientNet", "conv_stem", "blocks"), _timm_efficientnet),
    (_is("MobileNetV3", "conv_stem", "blocks"), _timm_efficientnet),
    (_is("ConvNeXt", "stem", "stages", "norm_pre"), _timm_convnext),
    (_is("SwinTransformer", "patch_embed", "layers", "norm"), _timm_swin),
    (_is("VisionTransformer", "patch_embed", "blocks", "norm_pre"), _timm_vit),
    (_is("BertModel", "embeddings", "encoder"), _bert),
    (_is("RobertaModel", "embeddings", "encoder"), _bert),
    (_is("GPT2Model", "wte", "h", "ln_f"), _gpt2),
    (_is("T5EncoderModel", "encoder"), _t5),
)


class _Leaves(fx.Tracer):
    """A tracer that leaves some modules whole."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.names or super().is_leaf_module(
            m, module_qualified_name
        )


class Piece(nn.Module):
    """A piece of a traced network, with all values that cross a cut as one.

    Args:
        graph: A function of these values.
    """

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Any) -> Any:
        return self.graph(*x) if isinstance(x, tuple) else self.graph(x)


def _by_names(model: nn.Module, names: Sequence[str]) -> Stages:
    """Cut a network after named modules."""
    try:
        traced = fx.GraphModule(model, _Leaves(names).trace(model))
    except Exception as error:
        raise ValueError(
            f"stages: `model` must be one that torch.fx traces, got {type(model).__name__}: "
            f"{first_line(error)}"
        ) from error
    last: dict[str, int] = {}
    nodes = list(traced.graph.nodes)
    for number, node in enumerate(nodes):
        if node.op == "call_module" and node.target in names:
            last[node.target] = number
    if missing := [name for name in names if name not in last]:
        raise ValueError(
            f"stages: `names` must be modules that the model calls, got {missing[0]!r}."
        )
    cuts = sorted(last.values())
    place = {node: sum(number > cut for cut in cuts) for number, node in enumerate(nodes)}
    pieces = [Piece(piece) for piece in _pieces(traced, model, place, len(cuts) + 1)]
    parts = [piece for piece in pieces if _works(piece)]
    return Stages([*parts], nn.Identity(), nn.Identity(), "NCHW")


def _works(piece: Piece) -> bool:
    """Return whether a piece does more than hand on its input."""
    graph = piece.graph.graph
    return any(n.op.startswith("call_") for n in graph.nodes)  # type: ignore[union-attr]


def _pieces(
    traced: fx.GraphModule, model: nn.Module, place: dict[fx.Node, int], n: int
) -> Iterator[fx.GraphModule]:
    """Yield a graph for each piece.

    It takes the values that earlier pieces made and this or a later one reads, the newest first,
    and returns those that later pieces read.
    """
    nodes = list(traced.graph.nodes)
    output = nodes[-1].all_input_nodes
    enter = [node for node in nodes if node.op == "placeholder"][:1]
    for i in range(n):
        inside = [x for x in nodes if place[x] == i and x.op not in ("placeholder", "output")]
        later = {y for x in nodes if place[x] > i for y in x.all_input_nodes}
        leave = [x for x in reversed([*enter, *inside]) if x in later or x in output]
        graph = fx.Graph()
        values = {x: graph.placeholder(x.name) for x in enter}
        for node in inside:
            values[node] = graph.node_copy(node, values.__getitem__)
        found = [values[x] for x in (output if i == n - 1 else leave)]
        graph.output(found[0] if len(found) == 1 else tuple(found))
        yield fx.GraphModule(model, graph)
        enter = leave
