"""Labelled text for the quickstart: the documentation and the source of Python's standard library.

Everything is read with `ast` and `tokenize`; no module is imported. A module, with all its
submodules, is either in the training data or in the test data, never in both.
"""

from __future__ import annotations

import ast
import io
import keyword
import random
import re
import sysconfig
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Span = tuple[int, int, str]
"""Start and end of a token in its line, in characters, and its kind."""

AREAS = {
    "networking": (
        "ftplib http imaplib ipaddress nntplib poplib smtplib socket socketserver ssl telnetlib "
        "urllib webbrowser wsgiref xmlrpc"
    ),
    "data formats": (
        "base64 configparser csv email html json mailbox mimetypes netrc pickle pickletools "
        "plistlib quopri tomllib xml"
    ),
    "files": (
        "bz2 dbm filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath "
        "shelve shutil stat tarfile tempfile zipapp zipfile _pyio"
    ),
    "concurrency": (
        "asyncio concurrent contextlib multiprocessing queue sched signal subprocess threading "
        "_threading_local"
    ),
    "numbers and dates": (
        "calendar colorsys datetime fractions numbers random statistics zoneinfo _pydatetime "
        "_pydecimal _strptime"
    ),
    "code tools": (
        "ast bdb cProfile code codeop compileall dis doctest importlib inspect lib2to3 "
        "modulefinder pdb pkgutil profile pstats py_compile pyclbr runpy symtable timeit tokenize "
        "trace traceback unittest zipimport"
    ),
    "user interfaces": "idlelib tkinter turtle turtledemo",
}
KINDS = ("name", "keyword", "operator", "number", "string", "comment")

AREA_QUESTIONS = (
    "Connect to the server, send the request and return its reply.",
    "Wait until every worker has finished, or until the timeout.",
    "Copy a whole directory tree, with the permissions of everything in it.",
)
TOKENS_QUESTIONS = (
    "if price > 9.50 and name not in seen:  # for the first time",
    'total += round(tax * 0.19, 2) or lookup["unknown tax"]',
)

MIN_WORDS = 9  # of a docstring
BEGINNING = 60  # characters that no two docstrings share
PER_MODULE = 120  # docstrings of one module at most, so that no module outweighs the others
TRAIN_PER_AREA, TEST_PER_AREA = 300, 100
TRAIN_LINES, TEST_LINES = 1000, 400
MOST_BYTES = 20_000  # of a module whose lines are taken: larger ones take long to read
FEWEST = 40  # test docstrings below which an area is left out: some systems package it apart

_KIND_OF_TYPE = {
    tokenize.OP: "operator",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
}
_TESTS = {"test", "tests", "idle_test"}
_FORMATTED = re.compile(r"(?i)[bru]*[ft][bru]*['\"]")


IGNORED = -100  # the label of what has none


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Example:
    """One row: its text, its label (or the spans of its tokens), and the module it comes from."""

    text: str
    label: str | tuple[Span, ...]
    source: str


@dataclass(frozen=True)
class Task:
    """A named task with its two splits.

    Attributes:
        name: Its name, which is also that of its adapter and of its head.
        labels: The names of the labels.
        train: What to train on.
        test: What to measure on.
        questions: A few inputs to answer when all is done.
        tagging: Whether the parts of a text are labelled, and not the text.
        by_module: Whether the splits share no module, and not only no row.
    """

    name: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    questions: tuple[str, ...]
    tagging: bool = False
    by_module: bool = True

    def describe(self) -> str:
        """One line about the data."""
        unit = "lines" if self.tagging else "texts"
        sizes = [f"{len(part)} {unit}" for part in (self.train, self.test)]
        if self.by_module:
            train, test = (len({e.source for e in part}) for part in (self.train, self.test))
            sizes = [f"{sizes[0]} of {train} modules", f"{sizes[1]} of {test} others"]
        return f"{self.name}: {len(self.labels)} labels, {sizes[0]} to train on, {sizes[1]} to test"


# --- modules ----------------------------------------------------------------------------------


def modules_of(names: str, library: Path | None = None) -> dict[str, Path]:
    """The modules of some packages of the standard library, without its tests: name and file.

    Args:
        names: Top-level modules and packages, separated by spaces; those that this Python does
            not have are left out.
        library: Folder of the standard library; None is that of this Python.
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    found = {}
    for name in names.split():
        for file in [folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))]:
            parts = file.relative_to(folder).with_suffix("").parts
            if file.is_file() and not _TESTS & set(parts):
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


def split_modules(modules: Mapping[str, Path], fold: int = 1) -> tuple[dict[str, Path], ...]:
    """Train and test modules: in alphabetical order, every third one is for the test.

    Args:
        modules: Name and file of each module.
        fold: Which of the three possible splits.
    """
    test = sorted(modules)[fold % 3 :: 3]
    train = [name for name in sorted(modules) if name not in test]
    return {name: modules[name] for name in train}, {name: modules[name] for name in test}


# --- task 1: the area of a docstring ----------------------------------------------------------


def clean(docstring: str, module: str) -> str:
    """A docstring on one line, without the names of its package and of its module."""
    names = "|".join(re.escape(name.lstrip("_")) for name in module.split("."))
    return " ".join(re.sub(rf"\b(?:{names})\b\.?", " ", docstring).split())


def docstrings(module: str, file: Path) -> Iterator[str]:
    """The docstrings of a module and of its classes and functions, cleaned."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own old escapes
        tree = ast.parse(file.read_bytes(), str(file))
    for node in ast.walk(tree):
        if isinstance(node, documented) and (found := ast.get_docstring(node)):
            text = clean(found, module)
            if len(re.findall(r"[A-Za-z]{2,}", text)) >= MIN_WORDS:
                yield text


def area_task(fold: int = 1, library: Path | None = None) -> Task:
    """Which area of the standard library a docstring comes from.

    Where several docstrings begin alike, also in different modules, the first one alone is taken.

    Args:
        fold: See `split_modules`.
        library: Folder of the standard library; None is that of this Python.
    """
    seen: set[str] = set()
    train: list[Example] = []
    test: list[Example] = []
    for area, names in AREAS.items():
        parts = [
            _of_area(area, modules, seen)
            for modules in split_modules(modules_of(names, library), fold)
        ]
        if len(parts[1]) >= FEWEST:
            train += parts[0][:TRAIN_PER_AREA]
            test += parts[1][:TEST_PER_AREA]
    labels = tuple(area for area in AREAS if any(e.label == area for e in test))
    if len(labels) < 2:
        raise DataError(
            f"Too little documentation under {library or sysconfig.get_path('stdlib')}: is the "
            "standard library installed as source? Use --data with a file of your own instead."
        )
    return Task("area", labels, train, test, AREA_QUESTIONS)


def _of_area(area: str, modules: Mapping[str, Path], seen: set[str]) -> list[Example]:
    generator, taken = random.Random(0), []
    for module, file in modules.items():
        examples = []
        for text in docstrings(module, file):
            beginning = re.sub(r"\W+", " ", text).lower()[:BEGINNING]
            if beginning not in seen:
                seen.add(beginning)
                examples.append(Example(text, area, module))
        taken += generator.sample(examples, min(len(examples), PER_MODULE))
    generator.shuffle(taken)
    return taken


# --- task 2: the kind of a token --------------------------------------------------------------


def kind_of(token: tokenize.TokenInfo) -> str | None:
    """The kind of a token, or None for what is only layout."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    return _KIND_OF_TYPE.get(token.type)


def tagged_lines(source: str) -> Iterator[tuple[str, tuple[Span, ...]]]:
    """The lines of a source text with the spans of their tokens, indentation cut off.

    Lines that share a token with another line are left out, and so are formatted strings, which
    are one token before Python 3.12 and several from then on.
    """
    lines = source.splitlines()
    spans: dict[int, list[Span]] = defaultdict(list)
    broken: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, start), (end_row, end) = token.start, token.end
        kind = kind_of(token)
        if "STRING_" in tokenize.tok_name[token.type] or (
            kind == "string" and (end_row > row or _FORMATTED.match(token.string))
        ):
            broken.update(range(row, end_row + 1))
        elif kind:
            spans[row].append((start, end, kind))
    for row in sorted(spans.keys() - broken):
        line = lines[row - 1]
        cut = len(line) - len(line.lstrip())
        yield line.strip(), tuple((s - cut, e - cut, kind) for s, e, kind in spans[row])


def tokens_task(fold: int = 1, library: Path | None = None) -> Task:
    """What kind of token each piece of a source line is part of, see `KINDS`.

    Args:
        fold: See `split_modules`.
        library: Folder of the standard library; None is that of this Python.
    """
    modules = modules_of(" ".join(AREAS.values()), library)
    small = {name: file for name, file in modules.items() if file.stat().st_size < MOST_BYTES}
    seen: set[str] = set()
    parts = []
    for part, count in zip(split_modules(small, fold), (TRAIN_LINES, TEST_LINES), strict=True):
        found = [e for name, file in part.items() for e in _lines_of(name, file, seen)]
        parts.append(balanced(found, count))
    return Task("tokens", KINDS, *parts, TOKENS_QUESTIONS, tagging=True)


def _lines_of(module: str, file: Path, seen: set[str]) -> Iterator[Example]:
    with tokenize.open(file) as opened:
        source = opened.read()
    for text, spans in tagged_lines(source):
        if len(spans) >= 3 and text not in seen:
            seen.add(text)
            yield Example(text, spans, module)


def balanced(examples: list[Example], count: int) -> list[Example]:
    """So many lines, in equal parts by the rarest kind of token that they hold."""
    frequency = Counter(kind for e in examples for _, _, kind in e.label)
    groups: dict[str, list[Example]] = defaultdict(list)
    generator = random.Random(0)
    for example in examples:
        groups[min((kind for _, _, kind in example.label), key=frequency.__getitem__)].append(
            example
        )
    for group in groups.values():
        generator.shuffle(group)
    queues = [groups[kind] for kind in sorted(groups)]
    taken: list[Example] = []
    while len(taken) < count and any(queues):
        taken += [queue.pop() for queue in queues if queue]
    return taken[:count]


def align(
    offsets: Sequence[tuple[int, int]], spans: Sequence[Span], number: Mapping[str, int]
) -> list[int]:
    """The label of each sub-word token: that of the span in which its first character lies.

    Args:
        offsets: Start and end of each sub-word token in its text; equal for special tokens.
        spans: Start, end and label of each labelled part of the text.
        number: The number of each label.

    Returns:
        Label numbers; -100 where there is no label.
    """
    at = {place: number[kind] for start, end, kind in spans for place in range(start, end)}
    return [
        next((at[place] for place in range(start, end) if place in at), IGNORED)
        for start, end in offsets
    ]
