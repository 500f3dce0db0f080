"""Formulas of the architectures for recommenders, against written-out ones."""

import re
from collections.abc import Callable

import pytest
import torch
from more_cases import Embed, chain, dbmtl, make, normal, pepnet, perceptron, table, towers
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo import AITM, DBMTL, ESCM2, ESMM, HPS, STEM, AITMDecoder, counterfactual_loss
from arch_zoo.aitm import Transfer
from arch_zoo.esmm import product_logit

close = torch.testing.assert_close
bce = functional.binary_cross_entropy_with_logits


def test_the_product_is_that_of_the_probabilities() -> None:
    a, b = normal(50).double() * 3, normal(50, seed=1).double() * 3
    close(torch.sigmoid(product_logit(a, b)), torch.sigmoid(a) * torch.sigmoid(b))
    sure = torch.tensor(40.0, dtype=torch.float64)
    loss = bce(product_logit(sure, sure), torch.zeros((), dtype=torch.float64))
    close(loss.item(), 39.307, rtol=0, atol=1e-3)  # of probabilities it would be 100, clamped


def test_esmm_is_the_written_formula() -> None:
    torch.manual_seed(0)
    model, batch = ESMM(Embed, perceptron(8, 1), perceptron(8, 1)), table()
    z = model.encoder(batch)
    p = torch.sigmoid(model.heads.click(z))
    q = torch.sigmoid(model.heads.conversion(z))
    clicks = torch.tensor([1.0, 0, 1, 0]).unsqueeze(1)
    bought = torch.tensor([1.0, 0, 0, 0]).unsqueeze(1)
    outputs = model(batch)
    close(bce(outputs["ctr"], clicks), functional.binary_cross_entropy(p, clicks))
    close(bce(outputs["ctcvr"], bought), functional.binary_cross_entropy(p * q, bought))
    close(torch.sigmoid(outputs["cvr"]), q)
    assert list(model(batch, ["ctr"])) == ["ctr"]


def test_a_sure_click_leaves_the_conversion() -> None:
    torch.manual_seed(0)
    model, batch = ESMM(Embed, perceptron(8, 1), perceptron(8, 1)).double(), table()
    batch["dense"] = batch["dense"].double()
    nn.init.constant_(model.heads.click[0].bias, 100.0)
    outputs, bought = model(batch), torch.tensor([[1.0], [0], [1], [0]], dtype=torch.float64)
    close(bce(outputs["ctcvr"], bought), bce(outputs["cvr"], bought))


def escm2() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return logits whose errors and propensities are round numbers, clicks and conversions."""
    clicks, bought = torch.tensor([1.0, 0, 1, 0]).double(), torch.tensor([1.0, 0, 1, 0]).double()
    errors = torch.tensor([0.2, 0.7, 0.4, 0.9]).double()
    q = torch.where(bought > 0, (-errors).exp(), 1 - (-errors).exp())
    outputs = {
        "ctr": torch.logit(torch.tensor([0.5, 0.25, 0.8, 0.1]).double()),
        "cvr": torch.logit(q),
        "imputation": torch.tensor([0.3, 0.6, 0.5, 0.8]).double(),
    }
    return {k: y.requires_grad_() for k, y in outputs.items()}, clicks, bought


@pytest.mark.parametrize(
    ("method", "value"), [("ips", 0.225), ("snips", 0.9 / 3.25), ("dr", 0.46875 + 0.008125)]
)
def test_counterfactual_losses(method: str, value: float) -> None:
    outputs, clicks, bought = escm2()
    loss = counterfactual_loss(outputs, clicks, bought, method=method)
    close(loss.item(), value, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    assert [g is not None for g in gradients] == [False, True, method == "dr"]


@pytest.mark.parametrize("method", ["ips", "dr"])
def test_counterfactual_losses_are_right_on_average(method: str) -> None:
    outputs, _, bought = escm2()
    p = torch.sigmoid(outputs["ctr"].detach())
    errors = bce(outputs["cvr"], bought, reduction="none").detach()
    mean = 0.0
    for bits in range(16):  # all patterns of clicks, as likely as the propensities say
        clicks = torch.tensor([bits >> i & 1 for i in range(4)]).double()
        chance = torch.where(clicks > 0, p, 1 - p).prod().item()
        if method == "ips":
            # an error counts where there is a click, whatever the label elsewhere
            weights = clicks / p
            value = (weights * errors).mean()
        else:
            gap = errors - outputs["imputation"].detach()
            value = (outputs["imputation"].detach() + clicks / p * gap).mean()
        mean += chance * value.item()
    close(mean, errors.mean().item(), rtol=1e-9, atol=0)


def test_without_clicks_there_is_no_loss_of_conversions() -> None:
    outputs, _, _ = escm2()
    none = torch.zeros(4).double()
    assert counterfactual_loss(outputs, none, none).item() == 0
    assert counterfactual_loss(outputs, none, none, method="snips").item() == 0
    sentence = (
        "counterfactual_loss: `conversions` must be 0 where `clicks` is, got one without a click."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        counterfactual_loss(outputs, none, none + 1)
    plain = ESCM2(Embed, perceptron(8, 1), perceptron(8, 1))(table())
    sentence = (
        "counterfactual_loss: `method` must be 'ips', 'snips', or 'dr' for a model with an "
        "imputation tower, got 'dr'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        counterfactual_loss(plain, none, none, method="dr")


def test_transfer_by_hand() -> None:
    unit = Transfer(4)
    for layer in unit.children():
        nn.init.eye_(layer.weight)
    handed, own = torch.tensor([[0.0, 1, 0, 1]]), torch.tensor([[1.0, 0, 2, 0]])
    close(unit(own, handed), torch.tensor([[0.8176, 0.1824, 1.6351, 0.1824]]), rtol=0, atol=1e-4)
    close(unit(own, handed), unit(handed, own))
    nn.init.zeros_(unit.query.weight)
    close(unit(own, handed), (own + handed) / 2)


def test_aitm_is_the_written_chain() -> None:
    torch.manual_seed(0)
    model = AITM(Embed, towers(*"abc"), towers(*"abc", sizes=(6, 1)), 6)
    batch, d = table(), model.heads
    z = model.encoder(batch)
    known: Tensor | None = None
    expected = {}
    for name in "abc":
        q = d.towers[name](z)
        if known is not None:
            p = d.hand_on[name](known)
            unit = d.transfers[name]
            scores = [(unit.query(u) * unit.key(u)).sum(1) / 6**0.5 for u in (q, p)]
            first = torch.sigmoid(scores[0] - scores[1]).unsqueeze(1)
            q = first * unit.value(q) + (1 - first) * unit.value(p)
        known = q
        expected[name] = d.heads[name](q)
    outputs, aux = model(batch, return_aux=True)
    close(outputs, expected)
    chances = [torch.sigmoid(y) for y in outputs.values()]
    close(aux["calibrator/b"], 0.6 * (chances[1] - chances[0]).relu().mean())
    close(aux["calibrator/c"], 0.6 * (chances[2] - chances[1]).relu().mean())
    assert model(batch, ["a", "c"], return_aux=True)[1] == {}


def test_aitm_of_one_task_is_hps() -> None:
    tower, head, embed = perceptron(8, 6), perceptron(6, 1), Embed()
    single = AITM(embed, {"a": tower}, {"a": head}, 6)
    close(single(table())["a"], HPS(embed, {"a": nn.Sequential(tower, head)})(table())["a"])


def test_dbmtl_is_the_written_formula_in_any_order() -> None:
    torch.manual_seed(0)
    model, batch = dbmtl(), table()
    d, z = model.heads, model.encoder(batch)
    a, first = d.towers["a"](z), d.towers["d"](z)
    b = d.relations["b"](torch.cat([d.towers["b"](z), first], 1))
    c = d.relations["c"](torch.cat([d.towers["c"](z), b, a], 1))
    features = {"c": c, "b": b, "a": a, "d": first}
    close(model(batch), {name: d.heads[name](h) for name, h in features.items()})


def test_dbmtl_without_edges_is_hps() -> None:
    embed, own, heads = Embed(), towers(*"ab"), towers(*"ab", sizes=(6, 1))
    joined = {name: nn.Sequential(own[name], heads[name]) for name in "ab"}
    close(DBMTL(embed, own, heads, {}, {})(table()), HPS(embed, joined)(table()))


def test_pepnet_starts_as_a_network_per_task() -> None:
    torch.manual_seed(0)
    model, batch = pepnet(even=True), table()
    given = {"domain": torch.tensor([0, 1, 2, 0]), "prior": normal(4, 5)}
    outputs = model(batch, **given)
    z = model.encoder(batch)
    for name in "ab":
        h = z
        for layer in model.towers[name]:
            h = torch.relu(layer(h))
        close(outputs[name], model.heads[name](h))


def test_pepnet_is_the_written_formula_and_gates_send_nothing_back() -> None:
    model, batch, named = make("PEPNet")
    e = model.encoder(batch).detach().requires_grad_()
    s, u = model.domain(named["domain"]), model.prior(named["prior"])

    def gate(unit: nn.Module, seen: Tensor) -> Tensor:
        return 2 * torch.sigmoid(unit.last(torch.relu(unit.first(seen))))

    o = gate(model.embedding_gate, torch.cat([s, e.detach()], 1)) * e
    h = o
    for layer, unit in zip(model.towers["a"], model.gates["a"], strict=True):
        factors = gate(unit, torch.cat([u, o.detach()], 1))
        h = factors * torch.relu(layer(h))
    y = model.heads["a"](h)
    close(model(batch, **named)["a"], y)
    weight = model.encoder.dense.weight
    (slope,) = torch.autograd.grad(y.sum(), e, retain_graph=True)
    through = torch.autograd.grad(model.encoder(batch), weight, slope)
    close(torch.autograd.grad(model(batch, **named)["a"].sum(), weight), through)


def test_stem_is_the_written_formula() -> None:
    torch.manual_seed(0)
    model = STEM(
        Embed, lambda: perceptron(8, 8), towers("a", "b", sizes=(8, 1)), num_shared=2
    ).initialize(table())
    x = {name: part(table()) for name, part in model.embeddings.items()}
    for name in "ab":
        g = torch.softmax(model.gates[name].layers(x[name] + x["shared"]), 1)
        columns = [bank(x[source]) for source, bank in model.experts.items()]
        z = torch.einsum("be,bec->bc", g, torch.cat(columns, 1))
        close(model(table(), [name])[name], model.heads[name](z))
    before = model(table())["a"]
    nn.init.normal_(model.embeddings["b"].users.weight)
    assert not torch.allclose(before, model(table())["a"])  # the value of others enters


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "names": (
        lambda: ESMM(Embed, perceptron(8, 1), perceptron(8, 1), names=("ctr", "cvr", "cvr")),
        "ESMM: `names` must be three different ones of click, conversion and product, none of them "
        "'imputation', got ('ctr', 'cvr', 'cvr').",
    ),
    "chain": (
        lambda: AITMDecoder(towers("a"), towers("b"), 6),
        "AITM: `towers` and `heads` must be of the same tasks, got ['a'] and ['b'].",
    ),
    "calibrator": (
        lambda: chain(calibrator_weight=-1.0),
        "AITM: `calibrator_weight` must be >= 0, got -1.0.",
    ),
    "circle": (
        lambda: DBMTL(Embed, towers(*"ab"), towers(*"ab"), {"a": ["b"], "b": ["a"]}, towers(*"ab")),
        "DBMTL: `parents` must have no circle, got 'a' -> 'b' -> 'a'.",
    ),
    "relations": (
        lambda: DBMTL(Embed, towers(*"ab"), towers(*"ab"), {"a": ["b"]}, {}),
        "DBMTL: `relations` must be those of the tasks with parents, ['a'], got [].",
    ),
    "strangers": (
        lambda: DBMTL(Embed, towers(*"ab"), towers(*"ab"), {"a": ["c"]}, towers("a")),
        "DBMTL: `heads`, `parents` and `relations` must be of the tasks of `towers`, ['a', 'b'], "
        "got ['a', 'b', 'c'].",
    ),
    "domain": (
        lambda: pepnet()(table(), prior=normal(4, 5)),
        "PEPNet: `domain` must be passed to a model with a `domain` module.",
    ),
    "prior": (
        lambda: pepnet(prior=None)(table(), domain=torch.tensor([0] * 4), prior=normal(4, 5)),
        "PEPNet: `prior` must be left out with a model without a `prior` module.",
    ),
    "stem": (
        lambda: STEM(Embed, lambda: perceptron(8, 8), towers("a", "shared"), num_specific=1),
        "STEM: `num_shared` must be >= 0, `num_specific` >= 1 and no task 'shared', got 1, 1 and "
        "'a', 'shared'.",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), ERRORS.values(), ids=ERRORS)
def test_bad_values(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()
