"""Formulas of the architectures for dense tasks, against written-out ones."""

import re

import pytest
import torch
from more_cases import Pyramid, make, normal, picture
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo import ASPP, FPN, HPS, DeepLabHead, FPNHead, InvPT, MTINet, PADNet, Resized
from arch_zoo.heads import resized
from arch_zoo.mtinet import Propagation

close = torch.testing.assert_close


def test_aspp_of_a_constant_map_is_constant_inside() -> None:
    torch.manual_seed(0)
    head = ASPP(4, rates=(1, 2)).eval()
    y = head(torch.ones(2, 3, 9, 9))
    inside = y[:, :, 2:-2, 2:-2]
    close(inside, inside[:, :, :1, :1].expand_as(inside))


def test_aspp_is_the_written_formula() -> None:
    torch.manual_seed(0)
    head = ASPP(4, rates=(2, 3)).eval()
    x = normal(2, 3, 9, 7)
    head(x)
    parts = []
    for branch, rate in zip(head.branches, (1, 2, 3), strict=True):
        conv, norm = branch[0], branch[1]
        y = functional.conv2d(
            x, conv.weight, padding=rate * (conv.weight.shape[-1] // 2), dilation=rate
        )
        parts.append(torch.relu(norm(y)))
    mean = x.mean((2, 3), keepdim=True)
    parts.append(head.pooled(mean).expand(-1, -1, 9, 7))
    close(head(x), head.join(torch.cat(parts, 1)))
    assert DeepLabHead(5, 4, (2, 3))(x).shape == (2, 5, 9, 7)


def test_a_pyramid_adds_what_coarser_maps_see() -> None:
    torch.manual_seed(0)
    fpn = FPN(5, n=3)
    maps = [normal(2, 4, 9, 7), normal(2, 6, 5, 4), normal(2, 8, 3, 2)]
    found = fpn(maps)
    top = fpn.lateral[2](maps[2])
    middle = fpn.lateral[1](maps[1]) + functional.interpolate(top, (5, 4), mode="nearest")
    low = fpn.lateral[0](maps[0]) + functional.interpolate(middle, (9, 7), mode="nearest")
    close(found, [fpn.smooth[i](y) for i, y in enumerate((low, middle, top))])
    close(fpn({"a": maps[0], "b": maps[1], "c": maps[2]}), found)
    sentence = "FPN: `maps` must be 3, from finest to coarsest, got 2."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fpn(maps[:2])


def test_a_shared_pyramid_serves_all_heads() -> None:
    torch.manual_seed(0)
    model = HPS(
        [Pyramid(), FPN(6, n=3)], {"seg": FPNHead(5, 6), "depth": Resized(FPNHead(1, 6), 2)}
    )
    outputs = model.initialize(picture())(picture())
    assert outputs["seg"].shape == (4, 5, 8, 8)
    assert outputs["depth"].shape == (4, 1, 16, 16)
    assert len(model.encode(picture()).shared) == 3
    assert model.parameter_task_sets()["encoder.1.smooth.0.weight"] == {"seg", "depth"}


def test_padnet_distils_by_the_written_formula() -> None:
    model, x, _ = make("PADNet")
    z, d = model.encoder(x), model.heads
    f = {name: block(z) for name, block in d.blocks.items()}
    result = model.run(x)
    assert list(result.predictions) == ["a/initial", "b/initial", "edge/initial"]
    for name, y in result.outputs.items():
        o = f[name]
        for other in ("a", "b", "edge"):
            if other != name:
                gate = torch.sigmoid(d.distillation[name].gates[other](f[other]))
                o = o + gate * d.distillation[name].values[other](f[other])
        close(y, d.heads[name](o))
        close(result.predictions[f"{name}/initial"].value, d.initial[name](f[name]))


def test_padnet_with_open_halves_adds_half_of_the_others() -> None:
    model, x, _ = make("PADNet")
    d = model.heads
    layer = d.distillation["a"]
    for name in ("b", "edge"):
        nn.init.zeros_(layer.gates[name].weight)
        nn.init.dirac_(layer.values[name].weight)
    f = {name: block(model.encoder(x)) for name, block in d.blocks.items()}
    assert torch.equal(layer(f), f["a"] + f["b"] / 2 + f["edge"] / 2)


def test_padnet_of_one_task_is_hps() -> None:
    torch.manual_seed(0)
    trunk = nn.Conv2d(3, 8, 3, padding=1)
    model, x = PADNet(trunk, {"a": 2}, channels=4), picture()
    model.initialize(x).eval()
    d = model.heads
    close(model(x), HPS(trunk, {"a": nn.Sequential(d.blocks["a"], d.heads["a"])}).eval()(x))


def test_propagation_weighs_tasks_at_each_pixel_and_channel() -> None:
    torch.manual_seed(0)
    layer = Propagation(4, ("a", "b"))
    f = {"a": normal(2, 4, 5, 3), "b": normal(2, 4, 5, 3, seed=1)}
    layer(f)
    layer.eval()
    scores = layer.attention(torch.cat([f["a"], f["b"]], 1))
    first = torch.sigmoid(scores[:, :4] - scores[:, 4:])  # a softmax over two tasks
    joined = torch.cat([first * f["a"], (1 - first) * f["b"]], 1)
    mixed = layer.reduce(joined)
    for name in "ab":
        factors = layer.excite[name](mixed.mean((2, 3)))[:, :, None, None]
        close(layer(f)[name], f[name] + factors * mixed)


def test_mtinet_is_the_written_order() -> None:
    model, x, _ = make("MTINet")
    model.eval()
    d, maps = model.heads, model.encoder(x)
    handed: dict[str, Tensor] = {}
    features = []
    for s in (2, 1, 0):
        level = {}
        for name in "ab":
            given = maps[s]
            if handed:
                given = torch.cat([given, resized(handed[name], given.shape[-2:])], 1)
            level[name] = d.levels[s][name](given)
        features.insert(0, level)
        handed = d.propagation[s - 1](level) if s else {}
    result = model.run(x)
    for name in "ab":
        distilled = [
            layer(level) for layer, level in zip(d.distillation[name], features, strict=True)
        ]
        close(result.outputs[name], d.heads[name](distilled))
        for s in range(3):
            initial = d.initial[s][name](features[s][name])
            close(result.predictions[f"{name}/scale {s}"].value, resized(initial, (8, 8)))


@pytest.mark.parametrize("size", [(9, 7), (12, 16)])
def test_any_size_goes(size: tuple[int, int]) -> None:
    x = normal(2, 3, *size)
    assert make("MTINet")[0](x)["a"].shape == (2, 1, *size)
    assert make("InvPT")[0](x)["a"].shape == (2, 1, 2 * size[0], 2 * size[1])


def test_mtinet_counts_the_maps() -> None:
    model = MTINet(Pyramid(), {"a": 1, "b": 1}, [4, 6])
    with pytest.raises(ValueError, match=r"^MTINet: the encoder must return 2 maps, got 3\.$"):
        model(picture())


def test_joint_attention_is_attention_over_the_pixels_of_all_tasks() -> None:
    block = make("InvPT")[0].heads.attention[0]
    maps = {"a": normal(2, 8, 4, 6), "b": normal(2, 8, 4, 6, seed=1)}
    tokens = torch.cat([m.flatten(2).mT for m in maps.values()], 1)
    pooled = [functional.avg_pool2d(m, 2).flatten(2).mT for m in maps.values()]
    keys = block.norm(torch.cat(pooled, 1))
    q, k, v = block.query(block.norm(tokens)), block.key(keys), block.value(keys)
    parts = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        scores = torch.softmax(q[..., own] @ k[..., own].mT / 4**0.5, -1)
        parts.append(scores @ v[..., own])
    y = tokens + block.out(torch.cat(parts, -1))
    y = y + block.mlp(block.norm2(y))
    found = block(maps)
    close(found["a"].flatten(2).mT, y[:, :24])
    close(found["b"].flatten(2).mT, y[:, 24:])


def test_without_values_tasks_of_invpt_do_not_meet() -> None:
    model, x, _ = make("InvPT")
    model.eval()
    for block in model.heads.attention:
        nn.init.zeros_(block.value.weight)
    before = model(x)["a"]
    nn.init.normal_(model.heads.mix["b"].weight)
    assert torch.equal(model(x)["a"], before)


def test_invpt_divides_its_channels() -> None:
    sentence = (
        "InvPT: `channels` must be divisible by 2 to the `stages` - 1 and then by `heads`, "
        "got 6, 3 and 2."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        InvPT(nn.Conv2d(3, 8, 3), {"a": 1}, channels=6)
