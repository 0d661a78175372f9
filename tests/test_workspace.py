"""The workspace keeps its promises: members are alike, and the commands are those of the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nox.project import load_toml

ROOT = Path(__file__).parents[1]
MEMBERS = {
    file.parent.name: file.parent
    for group in ("packages", "plugins")
    for file in sorted((ROOT / group).glob("*/pyproject.toml"))
}
SESSIONS = (
    "demo",
    "tests",
    "compat",
    "alone",
    "lint",
    "docs",
    "types",
    "golden",
    "numerics",
    "peer",
    "bench",
)
COMMANDS = ("python -m pip install nox", "python -m nox -s demo", "python -m nox -s tests")

member = pytest.mark.parametrize("folder", MEMBERS.values(), ids=list(MEMBERS))


@pytest.fixture(scope="module")
def sessions() -> dict[str, dict]:
    """Every nox session, by the name that the command line takes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NOX")}
    command = [sys.executable, "-m", "nox", "--list", "--json", "--sessions", *SESSIONS]
    listed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return {session["session"]: session for session in json.loads(listed.stdout)}


def project(folder: Path) -> dict:
    return load_toml(folder / "pyproject.toml")["project"]


@member
def test_member_is_built_by_hatchling(folder: Path) -> None:
    assert load_toml(folder / "pyproject.toml")["build-system"] == {
        "requires": ["hatchling"],
        "build-backend": "hatchling.build",
    }


@member
def test_member_describes_itself(folder: Path) -> None:
    told = project(folder)
    assert told["name"] == folder.name
    assert told["readme"] == "README.md"
    assert (folder / "README.md").read_text("utf-8").startswith(f"# {folder.name}\n")
    assert told["license"] == "Apache-2.0"
    assert told["requires-python"] == ">=3.10"
    assert "Typing :: Typed" in told["classifiers"]


@member
def test_member_has_the_common_layout(folder: Path) -> None:
    package = folder / "src" / folder.name.replace("-", "_")
    assert [p for p in (folder / "src").iterdir() if p.name != "__pycache__"] == [package]
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()
    assert list((folder / "tests").glob("test_*.py")), f"{folder.name} has no tests"


@member
def test_member_is_a_plugin_of_the_core(folder: Path) -> None:
    told = project(folder)
    if folder.name == "flexheads":
        assert told["scripts"] == {"flexheads": "flexheads.cli:app"}
        return
    names = [re.split(r"[^\w.-]", line)[0] for line in told["dependencies"]]
    assert "flexheads" in names
    entries = told["entry-points"]["flexheads"]
    assert entries
    for module in entries.values():
        file = folder / "src" / (module.replace(".", "/") + ".py")
        assert file.is_file(), f"the entry point {module!r} has no file"


def test_packages_share_one_version() -> None:
    versions = {n: project(f)["version"] for n, f in MEMBERS.items() if f.parent.name == "packages"}
    assert len(set(versions.values())) == 1, versions


def test_the_extra_all_names_every_other_package() -> None:
    packages = {n for n, f in MEMBERS.items() if f.parent.name == "packages"} - {"flexheads"}
    assert set(project(MEMBERS["flexheads"])["optional-dependencies"]["all"]) == packages


def test_the_root_is_not_a_distribution() -> None:
    assert {"project", "build-system"}.isdisjoint(load_toml(ROOT / "pyproject.toml"))


def test_no_root_file_lists_the_members() -> None:
    names = [name for name in MEMBERS if name not in ("flexheads", "flexheads-bert")]
    for file in ("noxfile.py", "pyproject.toml", "constraints.txt", ".ci/run"):
        text = (ROOT / file).read_text("utf-8")
        assert not [name for name in names if name in text], file


def test_sessions_exist_and_tell_what_they_do(sessions: dict[str, dict]) -> None:
    assert {session["name"] for session in sessions.values()} == set(SESSIONS)
    assert all(session["description"] for session in sessions.values())


def test_every_member_is_tested_alone(sessions: dict[str, dict]) -> None:
    alone = {s["call_spec"]["member"] for s in sessions.values() if s["name"] == "alone"}
    assert alone == set(MEMBERS)


def test_the_newest_release_of_the_compat_row_is_the_tested_one(sessions: dict[str, dict]) -> None:
    row = [s["call_spec"]["transformers"] for s in sessions.values() if s["name"] == "compat"]
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    assert row[0] == "4.57.6"
    assert f"transformers=={row[-1]};" in pins


def test_constraints_are_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    loose = [p for p in pins if not re.fullmatch(r"[\w-]+==[\w.]+(; python_version .+)?", p)]
    assert not loose


def test_ci_runs_what_the_readme_says(sessions: dict[str, dict]) -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert "python -m pip install nox" in script
    assert any(line.startswith("python -m nox -s tests") for line in script)
    commands = [line.partition("  #")[0] for line in script if " -s " in line]
    called = [command.split(" -s ")[1].strip('"') for command in commands]
    known = set(sessions) | {session["name"] for session in sessions.values()}
    assert set(called) <= known
    row = [name for name in sessions if name.startswith("compat")]
    assert {"lint", "types", row[0], "alone", "golden", "numerics", "peer"} <= set(called)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_shows_the_command(command: str) -> None:
    assert command in (ROOT / "README.md").read_text("utf-8")


def test_the_architecture_page_names_every_hook() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    specs = (ROOT / "packages/flexheads/src/flexheads/hookspecs.py").read_text(encoding="utf-8")
    hooks = re.findall(r"^def (flexheads_register_\w+)", specs, flags=re.MULTILINE)
    assert len(hooks) == 5
    assert all(f"`{hook}()`" in page for hook in hooks)
