"""Every snippet on the pages that need the packages of the extra ``integrations``."""

from pathlib import Path

import pytest
from pages import NEEDS, run

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors


@pytest.mark.parametrize("page", NEEDS)
def test_what_a_page_shows_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = run(page)
    assert "gradbal" in known
