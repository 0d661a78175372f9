"""Discovery of plugins: who is installed, who is to blame, who clashes; the result is a `Registry`.

Pluggy parses and validates hooks. The loop around it is our own, one plugin at a time, so that
every failure has a name on it and a failing plugin leaves nothing behind.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flexheads import hookspecs
from flexheads._registry import KINDS, Provider, Registry, SkippedPlugin, label_of
from flexheads.errors import ConflictError, PluginError, PluginWarning, UnknownNameError
from flexheads.specs import AdapterMethodSpec, ArchitectureSpec, Spec

CORE = hookspecs.PROJECT
DISABLE = "FLEXHEADS_DISABLE_PLUGINS"
STRICT = "FLEXHEADS_STRICT_PLUGINS"

BUILTIN_PLUGINS = tuple(f"flexheads.{part}.plugin" for part in ("methods", "heads", "checkpoints"))
"""Modules of the core that register through the same hooks, before any entry point."""

_NAME = r"[^\W\d]\w*"
_REFERENCE = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")


def registry() -> Registry:
    """Return what is installed: `load_registry()`, called once for all threads.

    Raises:
        PluginError: A plugin asks while the registry loads.
    """
    _refuse_while_loading()
    with _LOCK:
        return _load_once()


def load_registry(
    *, environ: Mapping[str, str] | None = None, builtins: Sequence[str] = BUILTIN_PLUGINS
) -> Registry:
    """Ask every installed plugin afresh what it provides.

    Args:
        environ: Where the two environment variables are read; ``os.environ`` by default.
        builtins: Modules of the core that are asked first.

    Raises:
        ConflictError: Two plugins claim one name; all conflicts are in the one error.
        PluginError: A built-in is broken, or any plugin where ``FLEXHEADS_STRICT_PLUGINS=1``.
    """
    _refuse_while_loading()
    token = _LOADING.set(True)
    try:
        return _load(os.environ if environ is None else environ, builtins)
    finally:
        _LOADING.reset(token)


def _refuse_while_loading() -> None:
    if _LOADING.get():
        raise PluginError("the registry was asked for while it loads; a plugin must not use it")


_load_once = functools.cache(load_registry)
_LOCK = threading.RLock()
_LOADING: ContextVar[bool] = ContextVar("flexheads_loading", default=False)


def resolve(reference: str) -> Any:
    """Import what a ``"module:attr"`` reference of a spec names.

    Raises:
        PluginError: It cannot be imported; the message names the plugin that registered it.
    """
    if not _REFERENCE.fullmatch(reference):
        raise PluginError(f"{reference!r} is not of the form 'module:attr'.")
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        who = [p for p, spec in registry().claims.values() if reference in _references(spec)]
        blamed = f"{reference!r}, named by {who[0] if who else 'no plugin'},"
        raise PluginError(f"{blamed} cannot be imported: {_reason(error)}") from error


def _load(environ: Mapping[str, str], builtins: Iterable[str]) -> Registry:
    loaded: list[tuple[Provider, Spec]] = []
    for module in builtins:
        provider = Provider(module, CORE, _version(CORE) or "0+unknown", module)
        try:
            found = _read(functools.partial(importlib.import_module, module))
        except (Exception, SystemExit) as error:
            raise PluginError(f"The core's {provider}: {_reason(error)}") from error
        loaded += ((provider, spec) for spec in found)

    disabled = {name.strip() for name in environ.get(DISABLE, "").split(",")}
    installed = _installed()
    times = Counter(provider.plugin for provider, _ in installed)
    skipped, namesakes = [], []
    failed: dict[Provider, BaseException] = {}
    for provider, read in installed:
        if provider.plugin in disabled:
            skipped.append(SkippedPlugin(provider, f"disabled by {DISABLE}"))
        elif times[provider.plugin] > 1:
            namesakes.append((provider, ("plugin name", provider.plugin)))
        else:
            try:
                loaded += ((provider, spec) for spec in read())
            except (Exception, SystemExit) as error:
                skipped.append(SkippedPlugin(provider, _reason(error)))
                failed[provider] = error

    _report(failed, strict=environ.get(STRICT, "") not in ("", "0"))
    taken = ((provider, claim) for provider, spec in loaded for claim in _claims(spec))
    _refuse_conflicts([*namesakes, *taken])
    tables: dict[str, Mapping[str, Any]] = {
        kind.table: MappingProxyType({s.name: s for _, s in loaded if isinstance(s, kind.spec)})
        for kind in KINDS.values()
    }
    claims = {claim: (provider, spec) for provider, spec in loaded for claim in _claims(spec)}
    return Registry(**tables, claims=MappingProxyType(claims), skipped=tuple(skipped))


Versions = Callable[[str], str | None]
"""What tells the version of a distribution that is installed."""


def _version(distribution: str) -> str | None:
    return next((d.version for d in importlib.metadata.distributions(name=distribution)), None)


def _installed() -> list[tuple[Provider, Callable[[], list[Spec]]]]:
    found = []
    version = functools.cache(_version)
    for point in importlib.metadata.entry_points(group=CORE):
        if dist := point.dist:  # importlib.metadata sets it on every installed entry point
            told = dist.metadata  # which is parsed whenever it is asked for
            module = point.value.split(":")[0]
            provider = Provider(point.name, told["Name"], told["Version"], module)
            found.append((provider, functools.partial(_read, point.load, dist, version)))
    return sorted(found, key=lambda candidate: str(candidate[0]))


def _read(
    load: Callable[[], object],
    dist: importlib.metadata.Distribution | None = None,
    version: Versions = _version,
) -> list[Spec]:
    """Check, import and ask one plugin: all that it registers, or an error."""
    if unmet := [] if dist is None else list(_unmet(dist.requires or (), version)):
        raise PluginError("; ".join(unmet))
    found = list(_ask(load()))
    if faults := _faults(found):
        raise PluginError("; ".join(faults))
    return found


def _unmet(requires: Iterable[str], version: Versions) -> Iterator[str]:
    """Yield the requirements on the core and on transformers that are not met.

    A core without metadata (used straight from its sources) has no version to hold against.
    """
    for requirement in map(Requirement, requires):
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name not in (CORE, "transformers") or (marker and not marker.evaluate({"extra": ""})):
            continue
        found = version(name)
        met = requirement.specifier.contains(found, prereleases=True) if found else name == CORE
        if not met:
            yield f"it requires {name}{requirement.specifier}; installed is {found or 'none'}"


def _ask(plugin: object) -> Iterator[Spec]:
    """Call each hook of one plugin, in a manager of its own, and consume what it returns."""
    manager = pluggy.PluginManager(CORE)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    callers = manager.get_hookcallers(plugin) or []
    unmarked = [n for n in KINDS if hasattr(plugin, n) and n not in {c.name for c in callers}]
    if unmarked or not callers:
        raise PluginError(f"it needs @{CORE}.hookimpl on {unmarked or 'at least one function'}")
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if caller.name in KINDS:
                yield from _call(caller.name, implementation.function)
            elif not implementation.optionalhook:
                raise UnknownNameError("hook", caller.name, KINDS)


def _call(hook: str, implementation: Callable[..., Any]) -> list[Spec]:
    try:
        found = list(implementation())
    except (Exception, SystemExit) as error:
        raise PluginError(f"{hook} raised {_reason(error)}") from error
    expected = KINDS[hook].spec
    for spec in found:
        if not isinstance(spec, expected):
            raise PluginError(f"{hook} gave {spec!r}, which is not of type {expected.__name__}")
    return found


def _faults(found: Sequence[Spec]) -> list[str]:
    """List the fields that are not what their annotations say; if none, the names misused."""
    fields = [(s, field) for s in found for field in ("model_types", "layers", "heads")]
    loose = [(s, field) for s, field in fields if not isinstance(getattr(s, field, ()), tuple)]
    faults = [f"{label_of(s)} {s.name!r}: {field} is not a tuple" for s, field in loose]
    wrong = [(s, r) for s in found for r in _references(s) if not _REFERENCE.fullmatch(str(r))]
    faults += [
        f"{label_of(s)} {s.name!r}: {r!r} is not of the form 'module:attr'" for s, r in wrong
    ]
    if not faults:
        times: Counter[tuple[str, object]] = Counter(c for s in found for c in _claims(s))
        twice = [claim for claim, count in times.items() if count > 1]
        blank = [c for c in times if not isinstance(c[1], str) or not c[1]]
        faults += [f"{label} {name!r} is registered twice" for label, name in twice]
        faults += [f"{label} {name!r} is not a name" for label, name in blank]
    return faults


def _references(spec: Spec) -> Iterator[str]:
    fields = ("backbone", "head", "method", "config", "format")
    yield from (getattr(spec, field) for field in fields if hasattr(spec, field))
    if isinstance(spec, AdapterMethodSpec):
        yield from (config for config, _ in spec.identifiers.values())


def _claims(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield the names that only one plugin may give, as ``(label, name)``."""
    yield label_of(spec), spec.name
    if isinstance(spec, ArchitectureSpec):
        yield from (("model type", model_type) for model_type in spec.model_types)
        yield "class with heads", spec.with_heads
    if isinstance(spec, AdapterMethodSpec):
        yield from (("adapter identifier", name) for name in spec.identifiers)
        yield "adapter method tag", spec.name if spec.tag is None else spec.tag


def _report(failed: Mapping[Provider, BaseException], *, strict: bool) -> None:
    """Warn of each plugin that failed or, where strict, raise one error for all of them."""
    blames = [f"{p} ({p.module}) cannot be used: {_reason(e)}." for p, e in failed.items()]
    if failed and strict:
        raise PluginError("\n".join(blames)) from next(iter(failed.values()))
    for blame in blames:
        note = f"It is skipped; {STRICT}=1 makes this an error, {DISABLE} silences it."
        warnings.warn(f"{blame} {note}", PluginWarning, stacklevel=4)


def _refuse_conflicts(taken: Iterable[tuple[Provider, tuple[str, str]]]) -> None:
    """Raise one error for all names, as ``(label, name)``, that more than one plugin gives."""
    claims: dict[tuple[str, str], list[Provider]] = defaultdict(list)
    for provider, claim in taken:
        claims[claim].append(provider)
    clashes: dict[tuple[Provider, ...], list[str]] = defaultdict(list)
    for (label, name), rivals in claims.items():
        if len(rivals) > 1:
            clashes[tuple(rivals)].append(f"{label} {name!r}")
    if clashes:
        lines = (f"- {', '.join(what)}: {_remedy(rivals)}" for rivals, what in clashes.items())
        raise ConflictError("\n".join(("Plugins claim the same names.", *lines)))


def _remedy(rivals: Sequence[Provider]) -> str:
    guests = [provider for provider in rivals if provider.distribution != CORE]
    uninstall = " or ".join(f"pip uninstall {p.distribution}" for p in guests)
    disable = " or ".join(f"{DISABLE}={n}" for n in dict.fromkeys(p.plugin for p in guests))
    return f"{' and '.join(map(str, rivals))}. Keep one: {uninstall}, or set {disable}."


def _reason(error: BaseException) -> str:
    ours = isinstance(error, (PluginError, UnknownNameError))
    text = " ".join(str(error).split()).rstrip(".")
    return text if ours else f"{type(error).__name__}: {text}"
