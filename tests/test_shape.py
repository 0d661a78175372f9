"""The shape of the code: who may import whom, what the core does not know, how long things get."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "packages" / "flexheads" / "src" / "flexheads"
SOURCES = sorted(f for g in ("packages", "plugins") for f in (ROOT / g).glob("*/src/**/*.py"))
CORE_FILES = [file for file in SOURCES if CORE in file.parents]

LAYERS = (
    ("specs", "errors", "composition", "routing", "layouts"),
    ("hookspecs", "plugins"),
    ("plan",),
    ("sites",),
    ("methods", "heads"),
    ("conversion", "checkpoints"),
    ("models",),
    ("training", "testing", "cli"),
)
ROOMS = (  # what lies directly in models/
    ("base", "container"),
    ("calls", "describing"),
    ("adapters", "features"),
    ("saving",),
    ("heads",),
    ("generating",),
    ("active", "static", "with_heads"),
    ("auto",),
)


def ranks(layers: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return {name: rank for rank, names in enumerate(layers) for name in names}


RANK = ranks(LAYERS)
ROOM_RANK = ranks(ROOMS)

MAX_FILE, MAX_FUNCTION = 400, 50

# Parts of names that no other word contains, and names that count only as words of their own.
ARCHITECTURES = re.compile(
    r"bert|electra|xlnet|gpt|llama|mistral|mixtral|gemma|qwen|bart|pegasus|longformer|wav2vec"
    r"|whisper|deit|beit|(?<![a-z])(?:m?t5|vit|xlm|bloom|falcon|swin)(?![a-z])"
    r"|(?-i:ViT|T5|XLM|CLIP|OPT)(?=[A-Z])",
    re.IGNORECASE,
)
# What may be named after all: pattern of files, and pattern of the text that does not count.
ALLOWED = (
    ("methods/*.py", r'"bert"'),  # a kind of initialisation of the adapters library
)

MACHINE = re.compile(r"(?<![\w.}])/(?:work|root|home|Users|opt)/\w")
HOST = re.compile(
    r"py" r"pi\.org|pythonhosted" r"\.org|npm" r"js\.(?:org|com)|--(?:extra-)?index-url"
)
TICKET = re.compile(r"(?i)\b(?:issue|ticket|pull request)s? #?\d+\b|(?<![\w&#/])#\d{1,5}(?![\w-])")

TORCH_FREE = ("specs", "errors", "composition", "routing", "layouts", "hookspecs", "plugins")


def ident(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


each_source = pytest.mark.parametrize("file", SOURCES, ids=ident)
each_core_file = pytest.mark.parametrize("file", CORE_FILES, ids=ident)


def module_name(file: Path) -> str:
    """The dotted name by which a source file is imported."""
    source = next(parent for parent in file.parents if parent.name == "src")
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def code(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, also inside functions, but nothing under ``if TYPE_CHECKING``."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from code(child)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from code(child)


@functools.cache
def core_imports(file: Path) -> tuple[tuple[int, str], ...]:
    """What a core file imports of the core: (line, dotted name under ``flexheads``)."""
    found = []
    package = module_name(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    for node in code(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "flexheads" or name.startswith("flexheads."):
                found.append((node.lineno, name.removeprefix("flexheads").removeprefix(".")))
    return tuple(found)


def part(name: str) -> str | None:
    """The file or folder directly in the core that a dotted name lies in, if it is one."""
    first = name.partition(".")[0]
    return first if (CORE / first).is_dir() or (CORE / f"{first}.py").is_file() else None


def rank(name: str, above: frozenset[str] = frozenset()) -> int:
    """The layer of a part. One that the table leaves out lies where its highest import lies."""
    if name in RANK:
        return RANK[name]
    files = (
        [CORE / f"{name}.py"] if (CORE / f"{name}.py").is_file() else (CORE / name).rglob("*.py")
    )
    used = {part(n) for file in files for _, n in core_imports(file)} - {None, name} - above
    return max((rank(u, above | {name}) for u in used if u), default=0)


@each_core_file
def test_layers_import_downwards(file: Path) -> None:
    own = file.relative_to(CORE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return  # the public face, over all layers
    wrong = []
    for line, name in core_imports(file):
        used = part(name)
        if used is None:
            wrong.append(f"line {line}: takes {name!r} from the package itself, not its module")
        elif rank(used) > rank(own):
            wrong.append(f"line {line}: {own} imports {used}, which lies above it")
    assert not wrong, "\n".join(wrong)


@each_core_file
def test_rooms_of_models_import_one_way(file: Path) -> None:
    """Rooms beside each other know nothing of each other either."""
    own = module_name(file).removeprefix("flexheads.").split(".")
    if own[0] != "models" or own == ["models"]:
        return
    wrong = []
    for line, name in core_imports(file):
        used = name.split(".")
        if used[0] != "models" or used[1] == own[1]:
            continue
        if ROOM_RANK[used[1]] >= ROOM_RANK[own[1]]:
            wrong.append(f"line {line}: {own[1]} imports {used[1]}, which does not lie below it")
    assert not wrong, "\n".join(wrong)


@each_core_file
def test_core_names_no_architecture(file: Path) -> None:
    text = file.read_text("utf-8")
    for pattern, allowed in ALLOWED:
        if file.relative_to(CORE).match(pattern):
            text = re.sub(allowed, '""', text)
    lines = enumerate(text.splitlines(), 1)
    named = [f"line {number}: {line}" for number, line in lines if ARCHITECTURES.search(line)]
    assert not named, "\n".join(named)


@each_source
def test_module_has_a_docstring(file: Path) -> None:
    assert ast.get_docstring(tree(file)), "say in one sentence what the module is for"


@each_source
def test_file_is_short(file: Path) -> None:
    lines = len(file.read_text("utf-8").splitlines())
    assert lines <= MAX_FILE, f"{lines} lines"


@each_source
def test_functions_are_short(file: Path) -> None:
    functions = (n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef))
    sizes = {f"{n.name} (line {n.lineno})": n.end_lineno - n.lineno + 1 for n in functions}
    assert not {name: size for name, size in sizes.items() if size > MAX_FUNCTION}


@each_source
def test_public_methods_are_documented(file: Path) -> None:
    """A method without a docstring of its own must override one that has it."""
    bare = []
    for kind in (n for n in ast.walk(tree(file)) if isinstance(n, ast.ClassDef)):
        if kind.bases or kind.name.startswith("_"):
            continue
        methods = (n for n in kind.body if isinstance(n, ast.FunctionDef))
        public = (m for m in methods if not m.name.startswith("_"))
        bare += [f"{kind.name}.{m.name}" for m in public if not ast.get_docstring(m)]
    assert not bare


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with one thread, outside the repository's root."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=CORE.parents[1], env=env, capture_output=True, text=True)


def imported(statement: str) -> set[str]:
    """Every module that a statement brings in, told by ``-X importtime``."""
    run = run_python("-W", "error", "-X", "importtime", "-c", statement)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("module", ["", *(f".{name}" for name in TORCH_FREE)])
def test_import_brings_nothing_heavy(module: str) -> None:
    roots = {name.partition(".")[0] for name in imported(f"import flexheads{module}")}
    assert "flexheads" in roots
    heavy = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors", "rich", "typer"}
    assert not roots & heavy
    assert not {name for name in roots if name.startswith("flexheads_")}, "a plugin was loaded"


ALONE = """
import os, sys, traceback, warnings
import transformers, torch.nn, transformers.modeling_utils, transformers.trainer

failed = 0
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            warnings.simplefilter("error")
            __import__(name)
        except BaseException:
            print(f"--- {name}", flush=True)
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(bool(failed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each import gets a process by fork")
def test_every_module_imports_alone() -> None:
    """In any order, so no module needs another to have been imported before it.

    Third parties are loaded once; each module of ours is then imported in a fork of its own, where
    any warning is an error.
    """
    names = map(module_name, SOURCES)
    # A package that needs a newer transformers than the installed one is not there.
    there = [name for name in names if find_spec(name.partition(".")[0]) is not None]
    assert len(there) > 100
    run = run_python("-c", textwrap.dedent(ALONE), *there)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def tracked() -> list[Path]:
    """The files of the repository, also those that are new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git work tree")
    return [ROOT / name for name in run.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_machine_a_host_or_a_ticket() -> None:
    wrong = []
    for file in tracked():
        try:
            lines = file.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if any(pattern.search(line) for pattern in (MACHINE, HOST, TICKET)):
                wrong.append(f"{ident(file)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)
