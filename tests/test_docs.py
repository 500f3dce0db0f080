"""Every snippet on every page runs; pages with heavy packages in ``integrations/test_pages.py``."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from pages import DOCS, NEEDS, pages, run, snippets

# torch's own, from compiling and from checkpoints without processes
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:torch.distributed is ",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
LIGHT = [page for page in pages() if page not in NEEDS]
SLOW = ("compare.md", "integrations/compile.md")


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in LIGHT]
)
def test_what_a_page_shows_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    run(page)


def test_pages_with_other_packages_are_there() -> None:
    assert set(NEEDS) <= set(pages())
    assert len([page for page in pages() if snippets(page)]) > 12


def test_links_of_the_readme_lead_somewhere_from_a_package_index_too() -> None:
    targets = re.findall(r"\]\(([^)]*)\)", (DOCS.parent / "README.md").read_text("utf-8"))
    assert targets
    for target in targets:
        assert target.startswith("https://")
        page = target.removeprefix("https://github.com/gradbal/gradbal/blob/main/")
        assert page == target or (DOCS.parent / page).is_file()


def test_code_in_other_fences_is_no_python() -> None:
    """What is not run says so: it is of other libraries, on the page on coming from elsewhere."""
    for page in pages():
        text = (DOCS / page).read_text("utf-8")
        if page != "migration.md":
            assert "{code-block}" not in text
        assert text.count("{code-block}") == len(re.findall(r"\(not run here; ", text))


def test_imports_of_the_examples_exist() -> None:
    """The examples with several ranks run every night; a module that moved shows here."""
    for path in sorted((DOCS / "examples").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gradbal"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), path.name
