"""README.md: its tour runs, and its tables are what the registry says."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_tour_runs_as_it_stands(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- tour -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    assert 15 <= len(blocks[0].splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks:
        exec(block, scope)
    mixed = scope["mixed"]
    assert mixed["topic"].logits.shape == (1, 3)
    assert mixed["ner"].logits.shape == (1, 12, 5)
    assert (tmp_path / "topic-adapter" / "adapter.safetensors").is_file()


@pytest.mark.usefixtures("tested_release")
def test_its_tables_are_what_the_registry_says():
    tool, page = ROOT / "tools" / "sync_docs.py", ROOT / "README.md"
    command = [sys.executable, str(tool), "--check", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in sorted((ROOT / "packages").glob("*/README.md")):
        if find_spec(page.parent.name.replace("-", "_")) is None:
            continue  # not for the installed transformers
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for block in blocks:
            exec(block, {})
    assert blocks, "no package page has a snippet"
