"""Running what the pages in ``docs`` show."""

import re
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parents[1] / "docs"
NAMES = "first_steps.md"  # its first block defines the names that all pages use
NEEDS = {  # pages that need a package of the extra `integrations`
    "integrations/accelerate.md": "accelerate",
    "integrations/lightning.md": "lightning",
    "integrations/logging.md": "tensorboard",
    "integrations/peft.md": "peft",
    "integrations/trainer.md": "transformers",
    "migration.md": "torchjd",
}


def pages() -> list[str]:
    return sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def snippets(page: str) -> list[str]:
    text = (DOCS / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """Run every snippet of a page, in turn, in the current folder; return the names it leaves."""
    torch.manual_seed(0)
    known: dict[str, Any] = {"__name__": "page"}
    blocks = snippets(page)
    for block in blocks if page == NAMES else [snippets(NAMES)[0], *blocks]:
        exec(compile(block, page, "exec"), known)
    return known
