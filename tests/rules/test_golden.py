"""Values worked out by hand or by an independent solver, to six decimals."""

from typing import Any, NamedTuple

import pytest
import torch
from cases import J2, J3, JP, JR, rows
from models import PUBLISHED
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules._base import Context, GramRule
from gradbal.step.state import Core
from gradbal.step.weighting import MODEL

L3 = [0.5, 2.0, 1.0]
MATRICES = {"J2": J2, "J3": J3, "JR": JR, "JP": JP}
EDGES = {
    "zero row": [[0, 0], [1, 2]],
    "identical": [[1, 2], [1, 2], [1, 2]],
    "opposite": [[1, 2], [-1, -2]],
    "one task": [[3, 4]],
}
NONE_RESCALED = {"c": 0.5, "rescale": None}
NOT_CLIPPED = {"max_norm": None}
GIVEN = {"order": "given"}
BARGAIN, HALF = {"alpha": 1.0}, {"alpha": 0.5}


class Golden(NamedTuple):
    rule: str
    options: dict[str, Any]
    case: str
    weights: list[float] | None
    direction: list[float] | None = None


GOLDEN = [
    Golden("ew", {}, "J3", [1, 1, 1], [1, 0, 3, 5]),
    Golden("ew", {"reduction": "mean"}, "J3", [1 / 3] * 3, [1 / 3, 0, 1, 5 / 3]),
    Golden("ew", {}, "J2", None, [-2, 1, 1]),
    Golden("ew", {}, "JR", None, [2, 2]),
    Golden("ew", {}, "JP", None, [3.5, 4, 4, 2]),
    Golden("uw", {"init": 0.0}, "J3", [0.5, 0.5, 0.5]),
    Golden("imtl_l", {"init": 0.0}, "J3", [1, 1, 1]),
    Golden(
        "gls", {}, "J3", [0.666667, 0.166667, 0.333333], [1.166667, -0.166667, 0.833333, 1.333333]
    ),
    Golden("famo", {}, "J3", [0.571429, 0.142857, 0.285714], [1, -0.142857, 0.714286, 1.142857]),
    Golden(
        "db_mtl",
        {"beta": 0.0},
        "J3",
        [3.055050, 2.256304, 1],
        [3.853797, 5.823963, 4.256304, 2.944950],
    ),
    Golden("constant", {"weights": [1, 2, 0.5]}, "J3", [1, 2, 0.5], [0, 5, 3, 2]),
    Golden("si", {}, "J3", [2, 0.5, 1], [3.5, -0.5, 2.5, 4]),
    Golden("si", {"preferences": (1.0, 0.0, 3.0)}, "J3", [2, 0, 3]),
    Golden("stch", {}, "J3", [2, 0.5, 1], [3.5, -0.5, 2.5, 4]),
    Golden(
        "stch",
        {"nadir": (1.0, 2.0, 4.0)},
        "J3",
        [1.714286, 0.857143, 0.428571],
        [2.571429, 2.571429, 1.714286, 0.857143],
    ),
    Golden("stch", {"nadir": (1.0, 2.0, 4.0), "mu": 0.1}, "J3", [0.005854, 1.498535, 0.000003]),
    Golden("stch_plain", {"mu": 0.1}, "J3", [0.002155, 0.319771, 0.011407]),
    Golden("pbi", {"preferences": (0.2, 0.3, 0.5)}, "J3", [-0.219937, 4.841700, -1.584163]),
    Golden(
        "cosmos",
        {"preferences": (0.2, 0.3, 0.5), "lam": 2.0},
        "J3",
        [0.078630, 0.522512, 0.115661],
    ),
    Golden("igb", {}, "J3", [2, 0.5, 1]),
    Golden("igb", {"base_losses": (1.0, 2.0, 4.0)}, "J3", [1.750536, 0.721536, 0.681659]),
    Golden("go4align", {"beta": 0.1}, "J3", [2.489387, 0.859824, 0.859824]),
    Golden("go4align", {"beta": 0.1, "groups": 1}, "J3", [1.403012] * 3),
    Golden("go4align", {"beta": 0.1, "groups": 3}, "J3", [2.489387, 0.535659, 1.183989]),
    Golden("group_dro", {"step_size": 0.1}, "J3", [0.933676, 1.084777, 0.981547]),
    Golden(
        "group_dro",
        {"step_size": 0.1, "reduction": "mean"},
        "J3",
        [0.311225, 0.361592, 0.327182],
    ),
    Golden("mgda", {}, "J2", [0.722222, 0.277778], [-0.111111, 0.277778, 0.722222]),
    Golden(
        "mgda", {}, "J3", [0.547718, 0.273859, 0.178423], [0.821577, 0.655602, 0.630705, 0.522822]
    ),
    Golden("mgda", {}, "JR", [0.4, 0, 0.6], [0.2, 0.6]),
    Golden(
        "mgda", {}, "JP", [0.486957, 0.408696, 0.104348], [1.356522, 1.486957, 0.721739, 0.591304]
    ),
    Golden("mgda", {"normalize": "l2"}, "J2", [0.5, 0.5], [-1, 0.5, 0.5]),
    Golden("upgrad", {}, "J2", [1.25, 0.65], [-0.7, 0.65, 1.25]),
    Golden(
        "upgrad", {}, "J3", [0.908301, 0.618167, 0.468554], [1.198434, 0.888586, 1.555276, 1.903025]
    ),
    Golden("upgrad", {}, "JR", [0.5, 0.333333, 0.666667], [0.666667, 1]),
    Golden("upgrad", {}, "JP", [1 / 3] * 3, [1.166667, 1.333333, 1.333333, 0.666667]),
    Golden("cagrad", {"c": 0.4, "rescale": None}, "J2", None, [-0.653590, 0.5, 0.846410]),
    Golden("cagrad", {"c": 0.4, "rescale": None}, "J3", None, [0.977395, 0.322031, 1, 1.344636]),
    Golden("cagrad", {"c": 0.4, "rescale": None}, "JR", None, [0.4, 0.933333]),
    Golden(
        "cagrad", {"c": 0.4, "rescale": None}, "JP", None, [1.639893, 2.056560, 1.407742, 0.991076]
    ),
    Golden("cagrad", NONE_RESCALED, "J2", None, [-0.566987, 0.5, 0.933013]),
    Golden("cagrad", NONE_RESCALED, "J3", None, [1.092840, 0.488067, 1.030947, 1.271440]),
    Golden("cagrad", {"c": 0.5}, "J3", None, [0.874272, 0.390454, 0.824757, 1.017152]),
    Golden(
        "cagrad", {"c": 0.5, "rescale": "c"}, "J3", None, [0.728560, 0.325378, 0.687298, 0.847627]
    ),
    Golden("cagrad", NONE_RESCALED, "JR", None, [0.333333, 1]),
    Golden("cagrad", NONE_RESCALED, "JP", None, [1.799954, 2.216621, 1.461096, 1.044429]),
    Golden("nash_mtl", NOT_CLIPPED, "J2", [1.232448, 0.551167], [-0.421054, 0.551167, 1.232448]),
    Golden(
        "nash_mtl",
        NOT_CLIPPED,
        "J3",
        [0.622916, 0.400568, 0.253271],
        [0.845264, 0.811536, 0.907110, 0.896710],
    ),
    Golden("nash_mtl", NOT_CLIPPED, "JR", [0.707107, 0.437016, 1.144123], [0.707107, 1.581139]),
    Golden(
        "nash_mtl",
        NOT_CLIPPED,
        "JP",
        [0.284940, 0.264098, 0.212424],
        [0.919348, 1.046402, 0.901372, 0.497364],
    ),
    Golden("aligned_mtl", {}, "J2", [1.139698, 0.580907], [-0.603023, 0.580907, 1.139698]),
    Golden(
        "aligned_mtl",
        {},
        "J3",
        [1.144507, 0.781649, 0.533137],
        [1.507365, 1.356906, 1.847922, 2.054313],
    ),
    Golden("aligned_mtl", {"scale_mode": "median"}, "J3", [1.745802, 1.192308, 0.813233]),
    Golden("aligned_mtl", {"scale_mode": "rmse"}, "J3", [2.852930, 1.948428, 1.328958]),
    Golden("aligned_mtl", {}, "JR", None, [1.154701, 2]),
    Golden("aligned_mtl", {}, "JP", None, [1.265632, 1.425075, 1.128653, 0.654826]),
    Golden("fairgrad", {}, "J2", [1.210454, 0.503996], [-0.301533, 0.503996, 1.210454]),
    Golden(
        "fairgrad",
        {},
        "J3",
        [0.491782, 0.289234, 0.181395],
        [0.694331, 0.633906, 0.652024, 0.596586],
    ),
    Golden("fairgrad", {}, "JR", [0.777200, 0.241097, 1.228340], [0.567157, 1.469436]),
    Golden(
        "fairgrad",
        {},
        "JP",
        [0.193781, 0.172370, 0.119857],
        [0.598449, 0.679789, 0.531941, 0.313638],
    ),
    Golden("fairgrad", BARGAIN, "J3", [0.622916, 0.400568, 0.253271]),
    Golden("fairgrad", BARGAIN, "JR", None, [0.707107, 1.581139]),
    Golden("fairgrad", HALF, "J2", [1.259921, 0.629961], [-0.629961, 0.629961, 1.259921]),
    Golden(
        "fairgrad",
        HALF,
        "J3",
        [0.791229, 0.557558, 0.370760],
        [1.024900, 0.980863, 1.299078, 1.433331],
    ),
    Golden("fairgrad", HALF, "JR", None, [0.943272, 1.734947]),
    Golden(
        "fairgrad",
        HALF,
        "JP",
        [0.427577, 0.409059, 0.362313],
        [1.426852, 1.626527, 1.495999, 0.789890],
    ),
    Golden(
        "pivrg",
        {"scores": (10.0, -5.0, 0.0)},
        "J3",
        [0.529948, 0.264974, 0.181439],
        [0.794922, 0.599112, 0.627853, 0.558689],
    ),
    Golden("pivrg", {}, "J3", [0.491782, 0.289234, 0.181395]),
    Golden("config", {}, "J2", None, [-0.552786, 0.723607, 1.618034]),
    Golden(
        "config",
        {},
        "J3",
        [1.765673, 1.034653, 0.734016],
        [2.496693, 1.933566, 2.502686, 2.638426],
    ),
    Golden("config", {}, "JR", None, [0.850762, 2.406317]),
    Golden("config", {}, "JP", None, [3.050548, 4.348794, 3.699891, 2.401645]),
    Golden("edm", {}, "J2", [0.690983, 0.309017], [-0.236068, 0.309017, 0.690983]),
    Golden(
        "edm", {}, "J3", [0.499576, 0.292743, 0.207681], [0.706409, 0.547079, 0.708105, 0.746511]
    ),
    Golden("dualproj", {}, "J2", [0.75, 0.5], [-0.75, 0.5, 0.75]),
    Golden("dualproj", {}, "J3", [0.5, 1 / 3, 1 / 3], [0.666667, 0.166667, 1, 1.5]),
    Golden("dualproj", {}, "JR", [1 / 3] * 3, [0.666667, 0.666667]),
    Golden("dualproj", {}, "JP", [1 / 3] * 3, [1.166667, 1.333333, 1.333333, 0.666667]),
    Golden(
        "pcd", {}, "J3", [1.201636, 0.132192, 0.246050], [2.271081, 0.614011, 0.624292, 0.274664]
    ),
    Golden(
        "pcd",
        {"tau": 0.5},
        "J3",
        [0.808819, 0.569190, 0.378447],
        [1.048448, 1.002601, 1.326085, 1.461864],
    ),
    Golden("imtl_g", {}, "J2", [0.690983, 0.309017], [-0.236068, 0.309017, 0.690983]),
    Golden(
        "imtl_g", {}, "J3", [0.499576, 0.292743, 0.207681], [0.706409, 0.547079, 0.708105, 0.746511]
    ),
    Golden("imtl_g", {}, "JR", [0.135796, 0.5, 0.364204], [0.407389, 0.864204]),
    Golden(
        "imtl_g", {}, "JP", [0.456519, 0.195630, 0.347852], [1.021704, 1.456519, 1.239185, 0.804370]
    ),
    Golden("imtl", {"init": 0.0}, "J3", [0.499576, 0.292743, 0.207681]),
    Golden("pcgrad", GIVEN, "J2", [2.5, 1.3], [-1.4, 1.3, 2.5]),
    Golden(
        "pcgrad",
        GIVEN,
        "J3",
        [2.666667, 1.757576, 1.357143],
        [3.575758, 2.510823, 4.471861, 5.476190],
    ),
    Golden("pcgrad", GIVEN, "JR", None, [2, 3]),
    Golden("pcgrad", GIVEN, "JP", [1, 1, 1], [3.5, 4, 4, 2]),
    Golden("gradvac", {}, "J2", [2.5, 1.3], [-1.4, 1.3, 2.5]),
    Golden("gradvac", {"target": 0.3}, "J2", [3.021515, 1.404303]),
    Golden("epo", {}, "J2", [0, 1]),
    Golden("epo", {}, "J3", [0, 1, 0]),
    Golden("pmtl", {}, "J2", [0.243423, 0.129808], [-0.146001, 0.129808, 0.243423]),
    Golden(
        "ferero",
        {"preferences": (0.6, 0.8)},
        "J2",
        [0.567010, 0.324742],
        [-0.407216, 0.324742, 0.567010],
    ),
]
EDGE_DIRECTIONS: dict[tuple[str, str], list[list[float]]] = {  # in the order of EDGES
    ("ew", "{}"): [[1, 2], [3, 6], [0, 0], [3, 4]],
    ("mgda", "{}"): [[0, 0], [1, 2], [0, 0], [3, 4]],
    ("upgrad", "{}"): [[0.5, 1], [1, 2], [0, 0], [3, 4]],
    ("cagrad", "no rescale"): [[0, 0], [1.5, 3], [0, 0], [4.5, 6]],
    ("nash_mtl", "no clip"): [[0.447214, 0.894427], [0.774597, 1.549193], [0, 0], [0.6, 0.8]],
    ("imtl_g", "{}"): [[1, 2], [1, 2], [0, 0], [3, 4]],
    ("aligned_mtl", "{}"): [[1, 2], [3, 6], [0, 0], [3, 4]],
    ("fairgrad", "{}"): [[0.341995, 0.683990], [0.493242, 0.986485], [0, 0], [0.350882, 0.467843]],
    ("fairgrad", "bargain"): [[0.447214, 0.894427], [0.774597, 1.549193], [0, 0], [0.6, 0.8]],
    ("config", "{}"): [[1, 2], [3, 6], [0, 0], [3, 4]],
    ("edm", "{}"): [[1, 2], [1, 2], [0, 0], [3, 4]],
    ("dualproj", "{}"): [[0.5, 1], [1, 2], [0, 0], [3, 4]],
    ("krum", "{}"): [[0.5, 1], [1, 2], [0, 0], [3, 4]],
    ("pcd", "{}"): [[0, 0], [1, 2], [1, 2], [3, 4]],
    ("pcgrad", "{}"): [[1, 2], [3, 6], [0, 0], [3, 4]],
    ("gradvac", "{}"): [[1, 2], [3, 6], [0, 0], [3, 4]],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "{}": {},
    "no rescale": NONE_RESCALED,
    "no clip": NOT_CLIPPED,
    "bargain": BARGAIN,
}


def close(ours: Tensor, theirs: list[float] | list[list[float]]) -> None:
    expected = torch.tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.rule} {g.options} {g.case}")
def test_golden(golden: Golden) -> None:
    jacobian = rows(MATRICES[golden.case])
    rule = make_rule(golden.rule, **golden.options)
    result = aggregate(jacobian, rule, losses=L3[: len(jacobian)])
    assert result.weights is not None
    if golden.weights is not None:
        close(result.weights, golden.weights)
    if golden.direction is not None:
        close(result.direction, golden.direction)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("name", "options"), EDGE_DIRECTIONS)
def test_edge_cases(name: str, options: str, edge: str) -> None:
    direction = EDGE_DIRECTIONS[name, options][list(EDGES).index(edge)]
    result = aggregate(rows(EDGES[edge]), make_rule(name, **OPTIONS[options]))
    close(result.direction, direction)


# ---------------------------------------------------------------------------- what is learned


def model_step(rule: str, losses: list[float]) -> MTLOptimizer:
    """One step of SGD with learning rate 0.1 on losses that have just these values."""
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0.1), rule)
    mtl_opt.step([loss * parameter.prod() for loss in losses])
    return mtl_opt


def test_uw_learns_beside_the_model() -> None:
    mtl_opt = model_step(PUBLISHED["uw"], L3)
    close(mtl_opt.core.state[MODEL]["log_variance"], [-0.025, 0.05, 0])
    mtl_opt.step([mtl_opt.param_groups[0]["params"][0].sum()] * 3)
    assert mtl_opt.last is not None
    close(mtl_opt.last.weights, [0.512658, 0.475615, 0.5])


def test_uw_value() -> None:
    result = aggregate(rows(J3), PUBLISHED["uw"], losses=L3)
    close(result.weights @ torch.tensor(L3, dtype=torch.float64), 1.75)


def test_imtl_l_learns_beside_the_model() -> None:
    mtl_opt = model_step(PUBLISHED["imtl_l"], L3)
    close(mtl_opt.core.state[MODEL]["log_scale"], [0.05, -0.1, 0])
    mtl_opt.step([mtl_opt.param_groups[0]["params"][0].sum()] * 3)
    assert mtl_opt.last is not None
    close(mtl_opt.last.weights, [1.051271, 0.904837, 1])


def test_imtl_learns_as_imtl_l_and_gives_its_scales_to_the_heads() -> None:
    mtl_opt = model_step(PUBLISHED["imtl"], L3)
    close(mtl_opt.core.state[MODEL]["log_scale"], [0.05, -0.1, 0])
    mtl_opt.step([mtl_opt.param_groups[0]["params"][0].sum()] * 3)
    assert mtl_opt.last is not None
    close(mtl_opt.last.heads, [1.051271, 0.904837, 1])


def test_imtl_balances_the_scaled_gradients() -> None:
    scales = torch.tensor([1.051271, 0.904837, 1], dtype=torch.float64)
    first = aggregate(rows(J3), PUBLISHED["imtl"], losses=L3)
    state = first.state
    state["tensors"]["log_scale"] = scales.log()
    ours = aggregate(rows(J3), PUBLISHED["imtl"], losses=L3, state=state).direction
    theirs = aggregate(rows(J3) * scales[:, None], "imtl_g").direction
    torch.testing.assert_close(ours, theirs)


def test_famo_over_three_steps() -> None:
    jacobian = rows(J3)
    result = aggregate(jacobian, "famo", losses=L3)
    result = aggregate(jacobian, "famo", losses=[0.4, 1.9, 0.7], state=result.state)
    logits = result.state["tensors"]["logits"]
    close(logits, [-0.025, 0.025, -0.025])
    close(logits.softmax(dim=0), [0.327732, 0.344536, 0.327732])
    close(result.weights, [0.557803, 0.123453, 0.318744])
    result = aggregate(jacobian, "famo", losses=[0.39, 1.5, 0.69], state=result.state)
    close(result.state["tensors"]["logits"], [-0.009804, 0.024690, -0.030922])


def test_famo_slope() -> None:
    rule = make_rule("famo")
    core = Core(rule, tasks=3, learner="adam", seed=0)
    losses = torch.tensor(L3, dtype=torch.float64)
    ctx = core.context(MODEL, range(3), losses)
    rule.weights(losses, ctx)
    rule.observe(torch.tensor([0.4, 1.9, 0.7], dtype=torch.float64), ctx)
    close(ctx.slopes["logits"], [0.004258, -0.053026, 0.048768])


def test_gradvac_over_two_steps() -> None:
    result = aggregate(rows(J2), "gradvac")
    close(result.weights, [2.5, 1.3])
    close(targets(result.state), [-0.335410, -0.335410])
    result = aggregate(rows(J2), "gradvac", state=result.state)
    close(result.weights, [1.909584, 1.181917])
    close(result.direction, [-1.636167, 1.181917, 1.909584])
    close(targets(result.state), [-0.503115, -0.503115])


def test_gradvac_from_a_target() -> None:
    result = aggregate(rows(J2), make_rule("gradvac", target=0.3))
    close(targets(result.state), [-0.185410, -0.185410])


def targets(state: dict[str, Any]) -> Tensor:
    found: Tensor = state["tensors"]["target"]
    return torch.stack((found[0, 1], found[1, 0]))


def gradnorm_context(rule: GramRule) -> Context:
    core = Core(rule, tasks=3, learner="sgd", seed=0)
    losses = torch.tensor(L3, dtype=torch.float64)
    ctx = core.context(MODEL, range(3), losses)
    rule.weights(rows(J3) @ rows(J3).T, ctx)
    return ctx


def test_gradnorm_trained_directly() -> None:
    options = {"parametrization": "direct", "learner": "sgd", "initial": (1.0, 2.0, 4.0)}
    rule = make_rule("gradnorm", **options)
    assert isinstance(rule, GramRule)
    close(gradnorm_context(rule).slopes["weights"], [-2.449490, -3.316625, 7.483315])
    result = aggregate(rows(J3), rule, losses=L3)
    close(result.weights, [1, 1, 1])
    result = aggregate(rows(J3), rule, losses=L3, state=result.state)
    close(result.weights, [1.076644, 1.098637, 0.824719])


def test_gradnorm_on_logits() -> None:
    rule = make_rule("gradnorm", initial=(1.0, 2.0, 4.0))
    assert isinstance(rule, GramRule)
    close(gradnorm_context(rule).slopes["weights"], [-3.021890, -3.889025, 6.910915])


def test_dwa_over_windows_of_one_step() -> None:
    state = None
    expected = [[1, 1, 1], [1, 1, 1], [0.926006, 0.998128, 1.075866]]
    for losses, weights in zip([[1, 2, 1], [0.6, 1.5, 0.9], [5, 5, 5]], expected, strict=True):
        result = aggregate(rows(J3), make_rule("dwa", window=1), losses=losses, state=state)
        close(result.weights, weights)
        state = result.state


def test_dwa_over_epochs_that_the_user_marks() -> None:
    parameter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0.0), "dwa")
    epochs = [[[0.5, 1, 0.5], [1.5, 3, 1.5]], [[0.7, 1.4, 0.9], [0.5, 1.6, 0.9]], [[1, 1, 1]]]
    for epoch, weights in zip(
        epochs, [[1, 1, 1], [1, 1, 1], [0.926006, 0.998128, 1.075866]], strict=True
    ):
        for losses in epoch:
            mtl_opt.step([loss * parameter for loss in losses])
            assert mtl_opt.last is not None
            close(mtl_opt.last.weights, weights)
        mtl_opt.end_epoch()


def test_ldc_mtl_at_given_shares() -> None:
    rule = make_rule("ldc_mtl", lam=0.1)
    core = Core(rule, tasks=3, learner="sgd", seed=0)
    losses = torch.tensor(L3, dtype=torch.float64)
    ctx = core.context(MODEL, range(3), losses)
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    ctx.state["logits"] = shares.log()
    close(rule.weights(losses, ctx), [0.18, 0.36, 0.45])
    slope = torch.tensor([0.45, 2.4, 0.9], dtype=torch.float64)  # in the shares
    close(ctx.slopes["logits"], (shares * (slope - shares @ slope)).tolist())


def test_ldc_mtl_learns_beside_the_model() -> None:
    mtl_opt = model_step("ldc_mtl", L3)
    assert mtl_opt.last is not None
    close(mtl_opt.last.weights, [0.95, 1.1, 0.95])
    close(mtl_opt.core.state[MODEL]["logits"], [0.024444, -0.033056, 0.008611])


def test_go4align_over_two_steps() -> None:
    rule, state = make_rule("go4align", beta=0.1), None
    steps = [
        (L3, [0.355627, 0.306091, 0.338283], [2.489387, 0.859824, 0.859824]),
        ([0.4, 1.0, 0.8], [0.367038, 0.297515, 0.335447], [2.018708, 0.788506, 0.788506]),
    ]
    for losses, shares, weights in steps:
        result = aggregate(rows(J3), rule, losses=losses, state=state)
        state = result.state
        close(state["tensors"]["logits"].softmax(dim=0), shares)
        close(result.weights, weights)


# ---------------------------------------------------------------------------- in detail


def test_epo_descends_where_losses_are_balanced() -> None:
    result = aggregate(rows(J3), "epo", losses=[1, 1, 1])
    close(result.weights, [0.465116, 0.232558, 0.302326])
    close(result.direction, [0.697674, -0.046512, 0.837209, 1.348837])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preferences": ((1, 0), (1, 1), (0, 1)), "index": 1},
        {"preferences": ((0, 2), (3, 3)), "index": -1},
    ],
)
def test_pmtl_on_three_rays(options: dict[str, Any]) -> None:
    result = aggregate(rows(J2), make_rule("pmtl", **options), losses=[0.5, 2])
    close(result.weights, [0.243423, 0.129808])


def test_ferero_multiplier_of_the_constraint() -> None:
    result = aggregate(rows(J2), make_rule("ferero", preferences=(0.6, 0.8)), losses=[0.5, 2])
    assert result.weights is not None
    extra = result.weights - torch.tensor([1, 0], dtype=torch.float64)
    close(extra, [-0.541237 * 0.8, 0.541237 * 0.6])


def test_imtl_g_common_projection() -> None:
    jacobian = rows(J3)
    direction = aggregate(jacobian, "imtl_g").direction
    close(jacobian @ direction / jacobian.norm(dim=1), [0.495363] * 3)


@pytest.mark.parametrize(
    ("case", "c", "point"),
    [("J3", 0.5, [0.927385, 0.072615, 0]), ("J2", 0.4, [1, 0]), ("J2", 0.5, [1, 0])],
)
def test_cagrad_point_of_the_hull(case: str, c: float, point: list[float]) -> None:
    jacobian = rows(MATRICES[case])
    result = aggregate(jacobian, make_rule("cagrad", c=c, rescale=None))
    assert result.weights is not None
    extra = result.weights - 1 / len(jacobian)
    close(extra / extra.sum(), point)


def test_moco_over_two_steps() -> None:
    rule, state = make_rule("moco", beta_sigma=0.0, gamma_sigma=0.0), None
    expected = [
        ([0.455556, 0.413889, 0.130556], [0.248611, 0.587500, 0.337500, 0.163889]),
        ([0.429983, 0.283629, 0.286389], [0.432253, 0.101484, 0.642305, 0.966263]),
    ]
    for weights, direction in expected:
        result = aggregate(rows(J3), rule, state=state)
        close(result.stats["weight"], weights)
        close(result.direction, direction)
        state = result.state


def test_db_mtl_over_two_steps() -> None:
    state = None
    for direction in (
        [0.385380, 0.582396, 0.425630, 0.294495],
        [0.732221, 1.106553, 0.808698, 0.559540],
    ):
        result = aggregate(rows(J3), "db_mtl", losses=L3, state=state)
        close(result.direction, direction)
        state = result.state


def test_excess_mtl_over_two_steps() -> None:
    rule, factors = make_rule("excess_mtl", step_size=0.1), rows([[0.5], [1], [2]])
    result = aggregate(rows(J3), rule)
    close(result.weights, [1, 1, 1])
    close(result.state["tensors"]["reference"], [4, 5, 12])
    result = aggregate(rows(J3) * factors, rule, state=result.state)
    close(result.weights, [0.931973, 0.978141, 1.089886])


def test_cr_mogm_over_two_steps() -> None:
    rule, jacobian = make_rule("cr_mogm"), rows(J3)
    result = aggregate(jacobian, rule)
    close(result.weights, [0.547718, 0.273859, 0.178423])
    result = aggregate(jacobian[[2, 0, 1]], rule, state=result.state)
    close(result.weights, [0.510788, 0.301245, 0.187967])


def test_nash_clips_the_shared_direction_only() -> None:
    rule = make_rule("nash_mtl")
    assert isinstance(rule, GramRule)
    core = Core(rule, tasks=2, learner="adam", seed=0)
    ctx = core.context(MODEL, range(2), torch.ones(2, dtype=torch.float64))
    shared, heads = rule.weights(rows(J2) @ rows(J2).T, ctx)
    close(heads, [1.232448, 0.551167])
    close((rows(J2).T @ shared).norm(), 1.0)
