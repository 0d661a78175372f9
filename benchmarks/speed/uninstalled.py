"""Runs the packages of this repository where they are not installed: from their folders.

Python finds a distribution's entry points in a folder ``*.dist-info`` on its path; such folders are
written from the members' pyproject.toml, into a directory that goes when the process ends.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Does nothing where flexheads is installed."""
    if importlib.util.find_spec("flexheads") is not None:
        return
    told = Path(tempfile.mkdtemp(prefix="flexheads-"))
    atexit.register(shutil.rmtree, told, ignore_errors=True)
    paths = [str(told)]
    for file in sorted(ROOT.glob("p*/*/pyproject.toml")):
        describe(read(file)["project"], told)
        paths.append(str(file.parent / "src"))
    sys.path[:0] = paths
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([inherited] if inherited else [])])


def read(file: Path) -> dict[str, Any]:
    """What a pyproject.toml says."""
    import tomllib  # Python 3.11

    return tomllib.loads(file.read_text("utf-8"))


def describe(project: dict[str, Any], folder: Path) -> None:
    """Writes what an installer would write of a distribution."""
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in project["dependencies"]]
    (info / "METADATA").write_text("\n".join([*lines, ""]), "utf-8")
    points = project.get("entry-points", {}).get("flexheads", {})
    entries = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[flexheads]", *entries, ""]), "utf-8")
