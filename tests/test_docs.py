"""docs/: every block of code runs as it stands, and generated parts are what the code says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flexheads.plugins import registry, resolve

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
WITHOUT_CODE = {"index.md", "methods/index.md", "speed.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WITHOUT_CODE])
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} shows no code"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": page}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        source = "\n" * line + block[1]
        exec(compile(source, str(DOCS / page), "exec", dont_inherit=True), scope)


@pytest.mark.usefixtures("tested_release")
def test_generated_parts_are_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "tools" / "sync_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_change_by_hand_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: heads -->\n\nby hand\n<!-- end -->\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools" / "sync_docs.py"), str(page)]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, "by hand" in page.read_text(encoding="utf-8")) == (1, True)
    subprocess.run(command, check=True)
    assert "`tagging`" in page.read_text(encoding="utf-8")
    subprocess.run([*command, "--check"], check=True)


def test_every_field_of_every_configuration_is_explained() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md")]
    explained = set(re.findall(r"^\| `(\w+)` \| `", "\n".join(pages), flags=re.MULTILINE))
    for spec in registry().methods.values():
        kinds = {reference for reference, _ in spec.identifiers.values()} | {spec.config}
        for kind in map(resolve, kinds):
            names = {field.name for field in dataclasses.fields(kind)} - {"configs"}
            assert names <= explained, (kind.__name__, sorted(names - explained))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("https://"):
            assert ((DOCS / page).parent / target).is_file(), target
