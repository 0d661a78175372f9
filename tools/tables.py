"""The generated parts of pages, each by the word that its marker begins with."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pieces import annotation, arxiv, attributes, code, first_sentence, paper, table

from flexheads import AdapterMethodSpec, load_config
from flexheads.composition import BLOCKS, BatchSplit, Rows, Split
from flexheads.errors import CompositionError
from flexheads.plugins import registry, resolve
from flexheads.routing import route

METHODS = Path(__file__).resolve().parents[1] / "docs" / "methods"
NEEDS = {"trainable_tokens": "trainable_tokens[token_indices=[0,1,2,3,4,5,6,7,8,9]]"}
"""What stands in for identifiers that need a field to be set: here ten tokens."""


def architectures() -> str:
    """Every architecture."""
    found = registry()
    rows = (
        (
            code(spec.name),
            code(spec.with_heads),
            code(found.provider_of(spec).distribution),
            code(*(c.static_class for c in found.conversions_for(spec.name))),
        )
        for spec in found.architectures.values()
    )
    return table(("architecture", "class", "package", "static heads that convert"), rows)


def matrix() -> str:
    """Which architecture carries which method, and how many static heads convert."""
    import carried

    found, answers = registry(), ("no", "yes")
    rows = (
        (
            code(spec.name),
            *(answers[one] for one in carried.carried(spec.name, NEEDS)),
            str(len(found.conversions_for(spec.name))),
        )
        for spec in found.architectures.values()
    )
    return table(("architecture", *map(code, carried.columns()), "static heads"), rows)


def head_matrix() -> str:
    """Which architecture takes which type of head; types that go the same way share a column."""
    import carried

    found = registry()
    answers = {name: carried.heads(name) for name in found.architectures}
    columns: dict[tuple[bool, ...], list[str]] = {}
    for head_type, column in zip(
        found.head_types, zip(*answers.values(), strict=True), strict=True
    ):
        columns.setdefault(column, []).append(head_type)
    rows = (
        (code(name), *("yes" if column[number] else "no" for column in columns))
        for number, name in enumerate(answers)
    )
    return table(("architecture", *(code(*names) for names in columns.values())), rows)


def block_matrix() -> str:
    """Which architecture runs under which block, and where it repeats rows for `Parallel`."""
    import carried

    rows = (
        (
            code(name),
            *("yes" if one else "no" for one in carried.blocks(name)),
            "a layer" if spec.shares_layers else "the entry",
        )
        for name, spec in registry().architectures.items()
    )
    return table(
        ("architecture", *map(code, carried.examples()), "`Parallel` repeats rows at"), rows
    )


def heads() -> str:
    """Every type of head."""
    found = registry()
    rows = (
        (code(spec.name), spec.description, code(found.provider_of(spec).distribution))
        for spec in found.head_types.values()
    )
    return table(("head type", "what", "package"), rows)


def methods() -> str:
    """Every adapter method, its configurations with links to their pages."""
    found, pages = registry(), pages_by_identifier()
    rows = (
        (
            code(spec.name),
            spec.description,
            ", ".join(f"[`{n}`](docs/methods/{pages[n]})" for n in spec.identifiers),
            code(found.provider_of(spec).distribution),
        )
        for spec in found.methods.values()
    )
    return table(("adapter method", "what", "configurations", "package"), rows)


def overview() -> str:
    """Every configuration of every method, and what there is to know before one chooses."""
    pages = pages_by_identifier()
    rows = []
    for spec in registry().methods.values():
        names: dict[str, list[str]] = {}
        for name in spec.identifiers:
            names.setdefault(_meaning(spec, name), []).append(name)
        for same in names.values():
            links = ", ".join(f"[`{name}`]({pages[name]})" for name in same)
            kind = resolve(spec.identifiers[same[0]][0])
            rows.append((links, *_facts(same[0]), paper(arxiv(kind))))
    return table(("configuration", *_FACTS, "paper (arXiv)"), rows)


def variants(*configs: str) -> str:
    """The configurations of one page: their other names, their class, and what is measured."""
    rows = []
    for config in configs:
        name = config.partition("[")[0]
        spec, kind, _ = registry().identifier(name)
        same = [n for n in spec.identifiers if _meaning(spec, n) == _meaning(spec, name)]
        shown = code(config, *(n for n in same if n != name and config == name))
        rows.append((shown, code(kind.rpartition(":")[2]), *_facts(config)))
    return table(("configuration", "class", *_FACTS), rows)


_FACTS = ("acts at", "parameters (BERT-base)", "merges", "changes nothing at first")


def _facts(config: str) -> tuple[str, ...]:
    import measured

    known = measured.facts(NEEDS.get(config, config))
    yes = ("no", "yes")
    return known.places, known.size, yes[known.merges], yes[known.neutral]


def takes() -> str:
    """Every configuration in every block, as tried on tiny models of three architectures."""
    import block_tables

    return block_tables.cells(pages_by_identifier())


def takes_there() -> str:
    """The same of the `adapters` library."""
    import block_tables

    return block_tables.peer()


def _meaning(spec: AdapterMethodSpec, name: str) -> str:
    """What an identifier stands for; the same for those that mean the same."""
    kind, fixed = spec.identifiers[name]
    return f"{kind} {dict(fixed)}"


def fusions() -> str:
    """The configurations of AdapterFusion."""
    import measured

    names = ("dynamic", "static")
    rows = ((code(name), measured.fusion_size(name)) for name in names)
    return table(("configuration", "parameters (BERT-base)"), rows)


def fields(*words: str) -> str:
    """The fields of a configuration, and in what others differ from it.

    Args:
        words: Identifiers, or classes as ``module:Class``; of these the first is shown. ``only:``
            and ``except:`` with patterns of names choose the fields.
    """
    chosen = [word for word in words if not word.startswith(("only:", "except:"))]
    configs = [_config(word) for word in chosen]
    first, meanings = configs[0], attributes(type(configs[0]))
    if hasattr(first, "configs"):
        return "\n".join(_members(name, c) for name, c in zip(chosen, configs, strict=True))
    rows = [
        (code(field.name), annotation(field.type), code(_value(first[field.name])), text)
        for field in dataclasses.fields(first)
        if _is_chosen(field.name, words)
        for text in [meanings[field.name]]
    ]
    shown = table(("field", "type", f"default of `{_title(chosen[0])}`", "meaning"), rows)
    others = zip(chosen[1:], configs[1:], strict=True)
    lines = [f"- `{_title(word)}`: {_differences(first, other)}\n" for word, other in others]
    return shown + ("\nOther defaults:\n\n" + "".join(lines) if lines else "")


def _config(word: str) -> Any:
    return resolve(word)() if ":" in word else load_config(word)


def _title(word: str) -> str:
    return word.rpartition(":")[2]


def _is_chosen(name: str, words: Sequence[str]) -> bool:
    for word in words:
        verb, _, patterns = word.partition(":")
        if verb in ("only", "except"):
            hit = any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split(","))
            if hit == (verb == "except"):
                return False
    return True


def _differences(one: Any, other: Any) -> str:
    different = [key for key in other if key not in one or one[key] != other[key]]
    return code(*(f"{key}={_value(other[key])}" for key in different)) or "the same"


def _members(name: str, union: Any) -> str:
    members = (
        f"`{type(member).__name__}` ({_differences(type(member)(), member)})"
        for member in (union.configs)
    )
    return f"- `{name}`: {'; '.join(members)}\n"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def about(name: str) -> str:
    """How a method of a model is called, and its first sentence."""
    method = getattr(_model_class(), name)
    if isinstance(method, property):
        return f"`model.{name}`: {first_sentence(method)}\n"
    parameters = [
        str(p.replace(annotation=inspect.Parameter.empty))
        for p in inspect.signature(method).parameters.values()
        if p.name not in ("self", "upstream")
    ]
    return f"`model.{name}({', '.join(parameters)})`\n\n{first_sentence(method)}\n"


def others() -> str:
    """The public methods of a model that have no section of their own."""
    page = (METHODS.parent / "model-methods.md").read_text(encoding="utf-8")
    named = set(re.findall(r"<!-- generated: about (\w+) -->", page))
    rows = (
        (code(name), first_sentence(getattr(_model_class(), name)))
        for name in public_methods()
        if name not in named
    )
    return table(("method", "what"), rows)


def public_methods() -> Iterator[str]:
    """The names that the library's own classes give to a model."""
    own = [k for k in _model_class().__mro__ if k.__module__.startswith("flexheads.models")]
    names = {name for kind in own for name in vars(kind) if not name.startswith("_")}
    for name in sorted(names):
        value = getattr(_model_class(), name)
        if (callable(value) or isinstance(value, property)) and not _is_upstream(name):
            yield name


def _is_upstream(name: str) -> bool:
    """Whether a name is one of transformers or torch that the library only extends."""
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel, name) and name not in ("add_adapter", "load_adapter")


def nesting() -> str:
    """Which block may stand inside which; a row is what is inside."""
    kinds = [kind for kind in BLOCKS.values() if kind is not Rows]
    inner = {"a name": "a", **{f"{k.__name__}": _block(k, "a", "b") for k in kinds}}
    inner["Rows"] = Rows(["a", "b"])
    rows = (
        (name if " " in name else code(name), *(_inside(kind, child) for kind in BLOCKS.values()))
        for name, child in inner.items()
    )
    return table(("inside ↓ of →", *(code(name) for name in BLOCKS)), rows)


def _block(kind: Any, *children: Any) -> Any:
    inside = 1 + (children[0] != "a")
    sizes = {Split: {"splits": 2 * inside}, BatchSplit: {"batch_sizes": inside}}
    return kind(list(children)) if kind is Rows else kind(*children, **sizes.get(kind, {}))


def _inside(kind: Any, child: Any) -> str:
    one, all_ = (_has_meaning(kind, child, other) for other in ("c", child))
    return {(True, True): "yes", (True, False): "one", (False, True): "all"}.get((one, all_), "no")


def _has_meaning(kind: Any, *children: Any) -> bool:
    try:
        route(_block(kind, *children))
    except CompositionError:
        return False
    return True


def _model_class() -> Any:
    from flexheads.models.with_heads import with_heads_class

    return with_heads_class("BertModelWithHeads")


def pages_by_identifier() -> dict[str, str]:
    """The page that each registered identifier is on, aliases included.

    Raises:
        LookupError: If one is on no page.
    """
    found: dict[str, str] = {}
    for page in sorted(METHODS.glob("*.md")):
        markers = re.findall(r"<!-- generated: variants (.*?) -->", page.read_text("utf-8"))
        named = {word for marker in markers for word in marker.split()}
        for spec in registry().methods.values():
            shown = {_meaning(spec, name) for name in spec.identifiers if name in named}
            same = [name for name in spec.identifiers if _meaning(spec, name) in shown]
            found |= dict.fromkeys(same, page.name)
    every = [name for spec in registry().methods.values() for name in spec.identifiers]
    if missing := [name for name in every if name not in found]:
        raise LookupError(
            f"{', '.join(missing)}: on no page of docs/methods. Add a page with a marker "
            "<!-- generated: variants ... --> that names it."
        )
    return found


PARTS: dict[str, Callable[..., str]] = {
    part.__name__: part
    for part in (
        architectures,
        matrix,
        head_matrix,
        block_matrix,
        heads,
        methods,
        overview,
        variants,
        fields,
        fusions,
        nesting,
        takes,
        takes_there,
        about,
        others,
    )
}
