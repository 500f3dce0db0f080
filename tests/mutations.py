"""The small changes that mutation testing makes to the package: what they are and where.

A change is known by its function and its statement, and so is found again after files have moved.
"""

import ast
import copy
import json
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
AREAS = ("rules", "solvers", "core")
# parts of the package that are left as they are
OUTSIDE = {"bench", "compare", "demo", "diagnostics", "distributed", "cli", "plots", "__main__"}

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
DROPPED = {"abs", "clamp", "clamp_", "clamp_min", "clamp_max", "masked_fill", "where"}
EXTREMES = {"min": "max", "amin": "amax", "argmin": "argmax", "minimum": "maximum"}
EXTREMES |= {largest: smallest for smallest, largest in EXTREMES.items()}


@dataclass(frozen=True)
class Mutant:
    """A change, as the table keeps it; `ordinal` counts equal ones in equal statements."""

    function: str
    statement: str
    kind: str
    before: str
    after: str
    ordinal: int = 0


class Place(NamedTuple):
    """Where a change is: lines from 1 on and bytes; `imported` if it runs when imported."""

    file: str
    start: tuple[int, int]
    end: tuple[int, int]
    statement: tuple[int, int]
    imported: bool


def alternatives(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what may stand in place of a node, each with the kind of change."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            if not any(isinstance(part, ast.JoinedStr) for part in (left, right)):
                yield "operator", ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in ARITHMETIC:
            yield "assignment", ast.AugAssign(target, ARITHMETIC[type(op)](), value)
        case ast.Compare(left, [op], right):
            for other in COMPARISONS.get(type(op), ()):
                yield "comparison", ast.Compare(left, [other()], right)
        case ast.BoolOp(op, values):
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield "boolean", operand
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign", operand
        case ast.Constant(bool() as value):
            yield "option", ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            for number in dict.fromkeys((value + 1, 2 * value, 0 * value)):
                yield "constant", ast.Constant(number)
        case ast.Call(ast.Attribute(ast.Name("torch"), "where"), [_, first, second]):
            yield from (("where", first), ("where", second))
        case ast.Call(ast.Attribute(ast.Name("torch"), name), [first, *_]) if name in DROPPED:
            yield "dropped", first
        case ast.Call(ast.Attribute(value, name)) if name in DROPPED:
            yield "dropped", value
        case ast.Attribute(value, name, ast.Load()) if name in EXTREMES:
            yield "extreme", ast.Attribute(value, EXTREMES[name])
        case ast.Name("min" | "max" as name, ast.Load()):
            yield "extreme", ast.Name(EXTREMES[name])


def header(statement: ast.stmt) -> str:
    """Return a statement in normal form, of a compound one the part before its body."""
    bare = copy.copy(statement)
    for name, empty in {"body": [ast.Pass()], "decorator_list": [], "orelse": []}.items():
        if hasattr(bare, name):
            setattr(bare, name, empty)
    text = ast.unparse(bare)
    return text.splitlines()[0] if hasattr(bare, "body") or hasattr(bare, "cases") else text


class Finder(ast.NodeVisitor):
    """Finds all changes of a file, except in decorators, annotations, errors and texts."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.names: list[str] = []
        self.imported = True
        self.statement: ast.stmt = ast.Pass()
        self.equal: Counter[Mutant] = Counter()
        self.found: list[tuple[Mutant, Place]] = []
        self.visit(ast.parse(source))

    def visit(self, node: ast.AST) -> None:
        outer = self.statement, self.imported
        if isinstance(node, ast.stmt):
            self.statement = node
        for kind, other in alternatives(node):
            self._add(node, kind, other)
        super().visit(node)
        self.statement, self.imported = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names.append(node.name)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self.imported = False
        for statement in node.body:
            self.visit(statement)
        self.names.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.AST) -> None:
        pass

    visit_Assert = visit_JoinedStr = visit_Raise

    def _add(self, node: Any, kind: str, other: ast.AST) -> None:
        before, after = ast.unparse(node), ast.unparse(other)
        if before == after:
            return
        mutant = Mutant(".".join(self.names), header(self.statement), kind, before, after)
        self.equal[mutant] += 1
        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        first, body = self.statement.lineno, getattr(self.statement, "body", None)
        last = max(first, body[0].lineno - 1) if body else self.statement.end_lineno or first
        place = Place(self.file, start, end, (first, last), self.imported)
        self.found.append((replace(mutant, ordinal=self.equal[mutant]), place))


def changes() -> Iterator[tuple[Mutant, Place]]:
    """Yield all changes of the package, in the order of files and lines."""
    for path in sorted((ROOT / "gradbal").rglob("*.py")):
        file = path.relative_to(ROOT)
        if not OUTSIDE & set(file.with_suffix("").parts):
            yield from Finder(str(file), path.read_text()).found


def changed(mutant: Mutant, place: Place) -> CodeType:
    """Compile a file with a change in it."""
    lines = (ROOT / place.file).read_bytes().splitlines(keepends=True)
    (first, left), (last, right) = place.start, place.end
    text = mutant.after if mutant.kind == "assignment" else f"({mutant.after})"
    middle = lines[first - 1][:left] + text.encode() + lines[last - 1][right:]
    source = b"".join([*lines[: first - 1], middle, *lines[last:]])
    with warnings.catch_warnings(action="ignore"):
        return compile(source, ROOT / place.file, "exec")


def draw(n: int, seed: int) -> list[dict[str, Any]]:
    """Draw changes, a third of them in each area and no two of one expression."""
    sites: dict[str, dict[Any, list[tuple[Mutant, Place]]]] = {name: {} for name in AREAS}
    for mutant, place in changes():
        part = place.file.split("/")[1]
        area = sites[part if part in AREAS else "core"]
        area.setdefault(place[:3], []).append((mutant, place))
    source = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number, (name, area) in enumerate(sites.items(), 1):
        for key in sorted(source.sample(sorted(area), n * number // len(AREAS) - len(rows))):
            mutant, place = source.choice(area[key])
            rows.append({"area": name, **where(place), **asdict(mutant), "verdicts": {}})
    return rows


def where(place: Place) -> dict[str, Any]:
    return {"file": place.file, "line": place.start[0], "column": place.start[1] + 1}


def loosely(mutant: Mutant) -> Mutant:
    """Forget the class that a method belongs to."""
    return replace(mutant, function="?." + mutant.function.split(".")[-1])


def find(rows: list[dict[str, Any]]) -> Iterator[tuple[Mutant, Place] | None]:
    """Yield where the changes of the table are now, in a file of the same name if possible."""
    known: dict[Mutant, list[tuple[Mutant, Place]]] = defaultdict(list)
    for mutant, place in changes():
        known[mutant].append((mutant, place))
        known[loosely(mutant)].append((mutant, place))
    for row in rows:
        mutant = Mutant(*(row[field.name] for field in fields(Mutant)))
        found = known[mutant] or known[loosely(mutant)]
        path = Path(row["file"])
        alike = [(Path(at.file) == path, Path(at.file).name == path.name) for _, at in found]
        clear = len(found) == 1 or True in max(alike, default=())
        yield found[alike.index(max(alike))] if clear else None


def write(table: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table, a change in a line."""
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    table.write_text(f"[\n{text}\n]\n")
