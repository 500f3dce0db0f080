"""Imports only go down, and what a user imports stays light."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A module may import from layers below its own, and from its own package.
# A new module joins the lowest layer that works; a package stands for all its modules.
LAYERS = [
    {"_utils"},
    {"checks", "gram", "sharded", "walk"},
    {"graph", "phases", "rule", "blocks", "losses", "record", "wrapper"},
    {"distributed"},
    {"registry", "solvers", "crossing", "transforms", "learner", "survey", "tasks", "trees"},
    {"work"},
    {"pieces"},
    {"chain", "pending", "log", "jacobians", "policy"},
    {"checkpoint", "rules", "engines", "sinks", "aside", "heads", "state", "grads", "closures"},
    {"core", "calls", "representation", "auto", "harvest"},
    {"decision", "learning", "probe"},
    {"arguments", "task_gradients", "aggregation"},
    {"roles"},
    {"planner", "several"},
    {"descent"},
    {"gathering", "reports", "reading"},
    {"flow"},
    {"optimizer"},
    {"__init__"},
    {"diagnostics", "bench"},
    {"plots"},
    {"demo"},
    {"compare"},
    {"cli"},
    {"__main__"},
]
LEAVES = set().union(*LAYERS[LAYERS.index({"__init__"}) + 1 :])
LAZY = {("__init__", "diagnostics")}  # imported when it is asked for; types alone before
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules(package: str) -> dict[str, Path]:
    """Return the modules of a package, by dotted name without the package's own."""
    base = ROOT / package
    found = {}
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Return everything that a file imports, also inside functions, as absolute dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def inside(package: str, name: str) -> list[str]:
    """Return the modules of the package that a module imports."""
    known = modules(package)
    found = set()
    for target in imports(known[name]):
        parts = target.split(".")
        if parts[0] == package:
            longest = [".".join(parts[1:n]) for n in range(len(parts), 1, -1)]
            found.add(next((part for part in longest if part in known), "__init__"))
    return sorted(found - {name})


def layer(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", modules("gradbal"))
def test_every_module_has_a_layer_and_looks_down(name: str) -> None:
    assert layer(name) in RANK, f"give gradbal.{name} a place in LAYERS"
    for target in inside("gradbal", name):
        if layer(target) == layer(name) or (name, target) in LAZY:
            continue
        below = RANK[layer(target)] < RANK[layer(name)]
        assert below, f"gradbal.{name} imports gradbal.{target}, which is not below it"


def test_nothing_imports_the_leaves_but_leaves() -> None:
    for name in modules("gradbal"):
        if layer(name) not in LEAVES:
            found = {t for t in inside("gradbal", name) if (name, t) not in LAZY}
            assert not {layer(target) for target in found} & LEAVES


@pytest.mark.parametrize("package", ["gradbal", "arch_zoo"])
def test_no_import_goes_round_in_a_circle(package: str) -> None:
    known = modules(package)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in inside(package, name):
                # importing from one's own package's __init__ is how packages are put together
                if target != "__init__" and not name.startswith(f"{target}."):
                    visit(target, (*path, name))
            done.add(name)

    for name in known:
        visit(name, ())


@pytest.mark.parametrize(("package", "other"), [("gradbal", "arch_zoo"), ("arch_zoo", "gradbal")])
def test_the_two_packages_do_not_know_each_other(package: str, other: str) -> None:
    for name, path in modules(package).items():
        if package == "gradbal" and layer(name) in LEAVES:
            continue  # the command line may train a model of the zoo
        assert not [target for target in imports(path) if target.split(".")[0] == other], name


def test_solvers_know_no_rule_and_crossings_no_optimizer() -> None:
    for name in modules("gradbal"):
        targets = {layer(target) for target in inside("gradbal", name)}
        if layer(name) == "solvers":
            assert targets <= {"solvers", "checks", "gram"}, name
        if layer(name) == "crossing":
            assert targets <= {"_utils", "crossing", "gram", "sharded", "walk"}, name
        if layer(name) == "rules":
            below = {"rules", "rule", "registry", "checks", "gram", "solvers", "learner", "chain"}
            assert targets <= {*below, "transforms"}, name


def test_every_rule_has_its_own_module_of_the_same_name() -> None:
    from gradbal.registry import RULES

    for name, entry in RULES.items():
        if entry.rule.__module__.startswith("gradbal."):
            assert entry.rule.__module__ == f"gradbal.rules.{name}"


HEAVY = ["cvxpy", "matplotlib", "sklearn", "scipy", "pandas", "lightning"]


@pytest.mark.parametrize("package", ["gradbal", "arch_zoo"])
def test_importing_pulls_in_nothing_heavy(package: str) -> None:
    program = (
        f"import sys, torch; import {package}; "
        f"print([m for m in {[*HEAVY, 'gradbal.diagnostics']!r} if m in sys.modules], "
        "'arch_zoo' in sys.modules, 'gradbal' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"[] {package == 'arch_zoo'} {package == 'gradbal'}"


def test_a_step_pulls_in_nothing_heavy_either() -> None:
    program = (
        "import sys, torch, gradbal; model = torch.nn.Linear(2, 3);\n"
        "for rule in gradbal.rule_names():\n"
        "    opt = gradbal.MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), rule)\n"
        "    losses = lambda: list(model(torch.ones(1, 2)).square().sum(0))\n"
        "    opt.step(losses(), *[losses] * (min(opt.rule.batches) - 1))\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


PRIVATE = re.compile(
    r"""(?<![\w"'])_(saved|raw_saved)_|\._input_metadata|\._sequence_nr|\._use_count|_DDPSink"""
    r"""|\._backward_hooks|_C\._|_profiler_enabled|\._cdata"""
)


def test_private_names_of_torch_stand_in_one_module() -> None:
    for name, path in modules("gradbal").items():
        if name != "_utils.torch_private":
            assert not PRIVATE.findall(path.read_text()), name


def test_both_packages_are_typed() -> None:
    assert (ROOT / "gradbal" / "py.typed").exists()
    assert (ROOT / "arch_zoo" / "py.typed").exists()
