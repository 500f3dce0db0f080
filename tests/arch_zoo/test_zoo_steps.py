"""`MTLOptimizer` on the newer architectures, told nothing but their losses."""

from typing import Any

import pytest
import torch
from backbone_cases import ARCHITECTURES, BACKBONES, GAPS, build
from more_cases import MORE, Embed, make, perceptron, table, towers

from arch_zoo import (
    ESCM2,
    MMoE,
    MultiTaskModel,
    TaskAffinity,
    counterfactual_loss,
    lookahead_affinity,
    task_losses,
)
from gradbal import MTLOptimizer
from gradbal.graph.heads_and_trunk import members


def sets_of_a_step(model: MultiTaskModel, losses: Any, aux: Any) -> dict[str, frozenset[str]]:
    """Take a step and return the tasks that it found for each trained parameter."""
    optimizer = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), "upgrad")
    optimizer.step(losses, aux=aux or None)
    names = [name for name, _ in model.named_parameters()]
    tasks = optimizer.core.names
    return {
        names[number]: frozenset(tasks[task] for task in members(bits))
        for number, bits in optimizer.core.sets.items()
    }


@pytest.mark.parametrize("name", MORE)
def test_a_step_finds_the_task_sets_of_the_model(name: str) -> None:
    model, x, named = make(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = model.run(x, **named)
    zeros = dict.fromkeys(model.tasks, 0.0)
    losses = task_losses(result, dict.fromkeys(model.tasks, lambda y, _: y.square().mean()), zeros)
    if name == "ESCM2":
        losses["cvr"] = losses["cvr"] + 0 * result.outputs["imputation"].sum()
    found = sets_of_a_step(model, losses, result.aux)
    sets = model.parameter_task_sets()
    assert found == {n: sets[n] for n in found}
    unseen = {n for n, p in model.named_parameters() if p.requires_grad and n not in found}
    assert not any(sets[n] for n in unseen)
    for n, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        assert parameter.requires_grad or torch.equal(parameter, before[n])


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_steps_on_every_backbone(architecture: str, name: str) -> None:
    if (architecture, name) in GAPS:
        with pytest.raises((TypeError, ValueError)):  # their sentences are tested elsewhere
            build(architecture, name)(BACKBONES[name].x(4, 1), **BACKBONES[name].named(4, 1))
        return
    model, backbone = build(architecture, name), BACKBONES[name]
    torch.manual_seed(0)
    outputs, aux = model(backbone.x(4, 1), **backbone.named(4, 1), return_aux=True)
    found = sets_of_a_step(model, {t: y.square().mean() for t, y in outputs.items()}, aux)
    sets = model.parameter_task_sets()
    assert found == {n: sets[n] for n in found}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(found)


def test_sparse_embeddings_with_two_optimizers() -> None:
    class Sparse(Embed):
        def __init__(self) -> None:
            super().__init__()
            self.users = torch.nn.Embedding(10, 8, sparse=True)

    torch.manual_seed(0)
    heads = towers("click", "buy", sizes=(8, 1))
    model = MMoE(lambda: perceptron(8, 8), heads, num_experts=2, stem=Sparse)
    model.initialize(table())
    rows = [model.stem.users.weight]
    dense = [p for p in model.parameters() if p is not rows[0]]
    bases = [torch.optim.SparseAdam(rows, lr=0.01), torch.optim.Adam(dense, lr=0.01)]
    optimizer, before = MTLOptimizer(bases, "upgrad"), rows[0].detach().clone()
    for seed in range(3):
        outputs = model(table(8, seed))
        optimizer.step({task: y.square().mean() for task, y in outputs.items()})
    moved = (rows[0] != before).any(1)
    used = torch.cat([table(8, seed)["user"] for seed in range(3)]).unique()
    assert moved.nonzero().flatten().tolist() == used.tolist()


def test_escm2_steps_on_its_three_losses() -> None:
    torch.manual_seed(0)
    model = ESCM2(Embed, perceptron(8, 1), perceptron(8, 1), imputation=perceptron(8, 1))
    clicks = torch.tensor([[1.0], [0], [1], [0]])
    bought = torch.tensor([[1.0], [0], [0], [0]])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    outputs = model(table())
    losses = {
        "ctr": bce(outputs["ctr"], clicks),
        "cvr": counterfactual_loss(outputs, clicks, bought, method="dr"),
        "ctcvr": bce(outputs["ctcvr"], bought),
    }
    found = sets_of_a_step(model, losses, None)
    assert found == model.parameter_task_sets()


def test_affinities_come_from_the_inner_products_of_a_step() -> None:
    model, x, _ = make("grouped")
    x["dense"] = x["dense"].double()
    every = [model.double().nodes[0]["0"].users.weight]

    def losses() -> dict[str, torch.Tensor]:
        return {task: (y - 1).square().mean() for task, y in model(x).items()}

    optimizer = MTLOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        "upgrad",
        gram_over=[model.nodes[0]["0"].users],
    )
    exact = lookahead_affinity(losses, every, 1e-4)
    optimizer.step(losses())
    affinity = TaskAffinity(model.tasks)
    affinity.update(optimizer.last.grams["model"], optimizer.last.losses, 1e-4)
    torch.testing.assert_close(affinity.matrix, exact.float(), rtol=0.01, atol=0)
