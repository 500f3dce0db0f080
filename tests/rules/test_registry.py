"""The list of rules: its names, and every sentence in which it refuses."""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, get_args

import pytest
import torch
from cases import ONE_BATCH
from torch import Tensor

import gradbal
from gradbal._utils import checks
from gradbal.rules import _registry as registry
from gradbal.rules._base import Context, GradientRule, GramRule, LossRule, Rule, WeightRule
from gradbal.rules._names import RuleName
from gradbal.rules._registry import RULES, make_rule, register, rule_names


@pytest.fixture
def _own_list(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test register without leaving anything behind."""
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


LOGARITHMIC = ("db_mtl", "epo", "gls", "go4align", "igb", "si", "stch")


def refused(sentence: str) -> Any:  # pytest's context manager
    return pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}$")


def test_names_are_sorted_and_those_of_modules() -> None:
    assert list(rule_names()) == sorted([*RULES, "conflict_free"])
    assert make_rule("conflict_free") == make_rule("config")
    for name, entry in RULES.items():
        module = import_module(f"gradbal.rules.{name}")
        assert entry.rule.__module__ == module.__name__
        assert getattr(gradbal.rules, entry.rule.__name__) is entry.rule


def test_entries_are_complete() -> None:
    for name, entry in RULES.items():
        assert entry.name == name
        assert entry.paper
        assert entry.year is None or 1900 < entry.year < 2100
        assert is_dataclass(entry.rule)
        assert issubclass(entry.rule, LossRule | GramRule | GradientRule)
        assert entry.rule.__doc__
        assert "Source:" in entry.rule.__doc__ or entry.year is None
        assert make_rule(name) == make_rule(name)


def test_rules_cannot_be_changed() -> None:
    for name in RULES:
        with pytest.raises(AttributeError):
            make_rule(name).anything = 1  # type: ignore[attr-defined]  # what is tested


def test_rule_objects_are_returned_as_they_are() -> None:
    rule = make_rule("cagrad", c=0.5)
    assert make_rule(rule) is rule


@pytest.mark.parametrize(
    ("name", "near"), [("nash_mlt", "nash_mtl"), ("UPGrad", "upgrad"), ("imtl_h", "imtl_l")]
)
def test_unknown_rule(name: str, near: str) -> None:
    sentence = (
        f"Unknown rule {name!r}. Did you mean {near!r}? `gradbal.rule_names()` lists all of them."
    )
    with refused(sentence):
        make_rule(name)


def test_unknown_rule_like_no_other() -> None:
    with refused("Unknown rule 'zzz'. `gradbal.rule_names()` lists all of them."):
        make_rule("zzz")


@pytest.mark.parametrize("name", [3, None, ["upgrad"]])
def test_no_rule_at_all(name: Any) -> None:
    sentence = (
        f"A rule must be a registered name or a Rule object, got {name!r}; "
        "`gradbal.rule_names()` lists all names."
    )
    with refused(sentence):
        make_rule(name)


def test_options_with_a_rule_object() -> None:
    sentence = (
        "make_rule: options go with a registered name, got them with "
        "CAGrad(c=0.4, rescale='c2', solver='exact'); use dataclasses.replace to change a rule "
        "object."
    )
    with refused(sentence):
        make_rule(make_rule("cagrad"), c=0.1)


@pytest.mark.parametrize(
    ("name", "option", "sentence"),
    [
        (
            "cagrad",
            "rescal",
            "CAGrad: unknown option 'rescal'. Did you mean 'rescale'? "
            "Its options: c, rescale, solver.",
        ),
        ("uw", "start", "UW: unknown option 'start'. Its options: init, learner."),
        ("rlw", "law", "RLW: unknown option 'law'. Its options: none."),
    ],
)
def test_unknown_option(name: str, option: str, sentence: str) -> None:
    with refused(sentence):
        make_rule(name, **{option: 1})


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("cagrad", {"c": -1}, "CAGrad: `c` must be >= 0, got -1."),
        ("cagrad", {"c": float("nan")}, "CAGrad: `c` must be >= 0, got nan."),
        ("cagrad", {"c": "a"}, "CAGrad: `c` must be a number, got 'a'."),
        (
            "cagrad",
            {"rescale": "c3"},
            "CAGrad: `rescale` must be one of 'c2', 'c', None, got 'c3'.",
        ),
        (
            "upgrad",
            {"solver": "quick"},
            "UPGrad: `solver` must be one of 'exact', 'cvxpy', got 'quick'.",
        ),
        ("upgrad", {"preferences": (1, -2)}, "UPGrad: `preferences` must be >= 0, got -2."),
        ("nash_mtl", {"max_norm": 0.0}, "NashMTL: `max_norm` must be > 0, got 0.0."),
        ("ew", {"reduction": "max"}, "EW: `reduction` must be one of 'sum', 'mean', got 'max'."),
        ("dwa", {"temperature": 0}, "DWA: `temperature` must be > 0, got 0."),
        ("dwa", {"window": 0}, "DWA: `window` must be >= 1, got 0."),
        ("famo", {"lr": 0}, "FAMO: `lr` must be > 0, got 0."),
        ("famo", {"gamma": -1}, "FAMO: `gamma` must be >= 0, got -1."),
        (
            "famo",
            {"after": "before"},
            "FAMO: `after` must be one of 'auto', 'closure', 'next', got 'before'.",
        ),
        ("graddrop", {"leak": 2}, "GradDrop: `leak` must be between 0 and 1, got 2."),
        ("gradnorm", {"alpha": -0.5}, "GradNorm: `alpha` must be >= 0, got -0.5."),
        ("gradnorm", {"learned_lr": 0}, "GradNorm: `learned_lr` must be > 0, got 0."),
        ("gradnorm", {"initial": (1, 0)}, "GradNorm: `initial` must be > 0, got 0."),
        (
            "gradnorm",
            {"parametrization": "log"},
            "GradNorm: `parametrization` must be one of 'softmax', 'direct', got 'log'.",
        ),
        (
            "gradnorm",
            {"learner": "lbfgs"},
            "GradNorm: `learner` must be one of 'adam', 'sgd', got 'lbfgs'.",
        ),
        ("gradvac", {"beta": 2}, "GradVac: `beta` must be between 0 and 1, got 2."),
        ("gradvac", {"target": -2}, "GradVac: `target` must be between -1 and 1, got -2."),
        (
            "gradvac",
            {"order": "reverse"},
            "GradVac: `order` must be one of 'random', 'given', got 'reverse'.",
        ),
        (
            "pcgrad",
            {"order": "reverse"},
            "PCGrad: `order` must be one of 'random', 'given', got 'reverse'.",
        ),
        ("epo", {"preferences": (1, 0)}, "EPO: `preferences` must be > 0, got 0."),
        ("epo", {"eps": -1}, "EPO: `eps` must be >= 0, got -1."),
        ("epo", {"relaxed": "x"}, "EPO: `relaxed` must be one of True, False, got 'x'."),
        ("constant", {"weights": [1, -2]}, "Constant: `weights` must be >= 0, got -2."),
        ("si", {"preferences": (-1, 1)}, "SI: `preferences` must be >= 0, got -1."),
        ("stch", {"mu": 0}, "STCH: `mu` must be > 0, got 0."),
        ("stch", {"warmup": -1}, "STCH: `warmup` must be >= 0, got -1."),
        ("stch", {"warmup": 0.5}, "STCH: `warmup` must be an int, got 0.5."),
        ("stch", {"window": 0}, "STCH: `window` must be >= 1, got 0."),
        ("stch", {"nadir": (1, 0)}, "STCH: `nadir` must be > 0, got 0."),
        ("stch_plain", {"mu": -1}, "STCHPlain: `mu` must be > 0, got -1."),
        ("stch_plain", {"preferences": (-1, 1)}, "STCHPlain: `preferences` must be >= 0, got -1."),
        (
            "stch_plain",
            {"ideal_point": ("a",)},
            "STCHPlain: `ideal_point` must be a number, got 'a'.",
        ),
        ("pbi", {"theta": -1}, "PBI: `theta` must be >= 0, got -1."),
        ("pbi", {"preferences": (0, 1)}, "PBI: `preferences` must be > 0, got 0."),
        ("pbi", {"ideal_point": ("a",)}, "PBI: `ideal_point` must be a number, got 'a'."),
        ("cosmos", {"lam": -1}, "COSMOS: `lam` must be >= 0, got -1."),
        ("cosmos", {"preferences": (0, 1)}, "COSMOS: `preferences` must be > 0, got 0."),
        ("cosmos", {"alpha": 0}, "COSMOS: `alpha` must be > 0, got 0."),
        ("igb", {"base_epoch": -1}, "IGB: `base_epoch` must be >= 0, got -1."),
        ("igb", {"window": 0}, "IGB: `window` must be >= 1, got 0."),
        ("igb", {"base_losses": (0, 1)}, "IGB: `base_losses` must be > 0, got 0."),
        ("go4align", {"beta": -1}, "GO4Align: `beta` must be >= 0, got -1."),
        ("go4align", {"groups": 0}, "GO4Align: `groups` must be >= 1, got 0."),
        ("go4align", {"groups": 1.5}, "GO4Align: `groups` must be an int, got 1.5."),
        ("ldc_mtl", {"lam": -1}, "LDCMTL: `lam` must be >= 0, got -1."),
        ("ldc_mtl", {"tau": (1, 0)}, "LDCMTL: `tau` must be > 0, got 0."),
        ("ldc_mtl", {"tau": "last"}, "LDCMTL: `tau` must be one of 'first', got 'last'."),
        ("group_dro", {"step_size": 0}, "GroupDRO: `step_size` must be > 0, got 0."),
        (
            "group_dro",
            {"reduction": "max"},
            "GroupDRO: `reduction` must be one of 'sum', 'mean', got 'max'.",
        ),
        (
            "aligned_mtl",
            {"scale_mode": "mean"},
            "AlignedMTL: `scale_mode` must be one of 'min', 'median', 'rmse', got 'mean'.",
        ),
        (
            "aligned_mtl",
            {"preferences": (1, -1)},
            "AlignedMTL: `preferences` must be >= 0, got -1.",
        ),
        ("aligned_mtl", {"tol": 2.0}, "AlignedMTL: `tol` must be between 0 and 1, got 2.0."),
        ("fairgrad", {"alpha": 0}, "FairGrad: `alpha` must be > 0, got 0."),
        (
            "fairgrad",
            {"solver": "x"},
            "FairGrad: `solver` must be one of 'exact', 'cvxpy', got 'x'.",
        ),
        ("config", {"preferences": (-1,)}, "ConFIG: `preferences` must be >= 0, got -1."),
        (
            "config",
            {"length_model": "sum"},
            "ConFIG: `length_model` must be one of 'projection', 'min', 'max', 'arithmetic', "
            "'geometric', 'harmonic', got 'sum'.",
        ),
        ("dualproj", {"preferences": (-1,)}, "DualProj: `preferences` must be >= 0, got -1."),
        (
            "dualproj",
            {"solver": "x"},
            "DualProj: `solver` must be one of 'exact', 'cvxpy', got 'x'.",
        ),
        ("krum", {"n_byzantine": -1}, "Krum: `n_byzantine` must be >= 0, got -1."),
        ("krum", {"n_byzantine": 1.0}, "Krum: `n_byzantine` must be an int, got 1.0."),
        ("krum", {"n_selected": 0}, "Krum: `n_selected` must be >= 1, got 0."),
        ("krum", {"squared": 2}, "Krum: `squared` must be one of True, False, got 2."),
        ("trimmed_mean", {"n_trimmed": -1}, "TrimmedMean: `n_trimmed` must be >= 0, got -1."),
        ("trimmed_mean", {"n_trimmed": 0.1}, "TrimmedMean: `n_trimmed` must be an int, got 0.1."),
        ("pcd", {"tau": 2}, "PCD: `tau` must be between 0 and 1, got 2."),
        ("pcd", {"taus": (0, 2)}, "PCD: `taus` must be between 0 and 1, got 2."),
        ("pcd", {"beta": -1}, "PCD: `beta` must be between 0 and 1, got -1."),
        ("pivrg", {"scores": ("a",)}, "PIVRG: `scores` must be a number, got 'a'."),
        ("pivrg", {"bound": 0.5}, "PIVRG: `bound` must be >= 1, got 0.5."),
        ("pivrg", {"min_temperature": 0}, "PIVRG: `min_temperature` must be > 0, got 0."),
        ("pivrg", {"solver": "x"}, "PIVRG: `solver` must be one of 'exact', 'cvxpy', got 'x'."),
        (
            "imtl_g",
            {"fallback": "none"},
            "IMTLG: `fallback` must be one of 'min_norm', got 'none'.",
        ),
        (
            "mgda",
            {"normalize": "l1"},
            "MGDA: `normalize` must be one of 'none', 'l2', 'loss', 'loss+', got 'l1'.",
        ),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], sentence: str) -> None:
    with refused(sentence):
        make_rule(name, **options)


@pytest.mark.parametrize("name", ONE_BATCH)
def test_losses_below_zero(name: str) -> None:
    sentence = (
        f"{RULES[name].rule.__name__}: losses must be > 0, got -2 for task '1'; shift the loss or "
        "choose a rule that does not take its logarithm."
    )
    if name in LOGARITHMIC:
        with refused(sentence):
            gradbal.aggregate(torch.eye(3), name, losses=[1.0, -2.0, 3.0])
    else:
        result = gradbal.aggregate(torch.eye(3), name, losses=[1.0, -2.0, 3.0])
        assert result.direction.isfinite().all()


# ---------------------------------------------------------------------------- registering


@pytest.mark.usefixtures("_own_list")
def test_a_new_rule_works_at_once() -> None:
    @register("mine", paper="nobody", year=2030)
    class Mine(LossRule):
        def weights(self, losses: Tensor, ctx: Context) -> Tensor:
            return losses / losses.sum()

    assert "mine" in rule_names()
    assert isinstance(make_rule("mine"), Mine)
    result = gradbal.aggregate(torch.eye(2), "mine", losses=[1.0, 3.0])
    assert result.direction.tolist() == [0.25, 0.75]


@pytest.mark.usefixtures("_own_list")
def test_a_name_is_given_once() -> None:
    with refused("register: the name 'ew' is taken by EW; choose another."):
        register("ew")(make_rule("uw").__class__)


@pytest.mark.usefixtures("_own_list")
@pytest.mark.parametrize("rule", [3, dict, Rule, WeightRule])
def test_only_rules_are_registered(rule: Any) -> None:
    sentence = (
        f"register: 'mine' must decorate a LossRule, a GramRule or a GradientRule, got {rule!r}."
    )
    with refused(sentence):
        register("mine")(rule)
    assert "mine" not in RULES


def test_the_list_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        RULES["mine"] = RULES["ew"]  # type: ignore[index]  # what is tested


def test_suggestions() -> None:
    assert checks.did_you_mean("upgard", RULES) == " Did you mean 'upgrad'?"
    assert checks.did_you_mean("something else", RULES) == ""


def test_editors_complete_the_names_of_all_rules() -> None:
    assert get_args(RuleName) == rule_names()
