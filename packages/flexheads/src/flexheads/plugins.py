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
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flexheads import hookspecs, specs
from flexheads.errors import ConflictError, PluginError, PluginWarning, UnknownNameError
from flexheads.specs import AdapterMethodSpec, ArchitectureSpec, HeadConversion, Spec

CORE = hookspecs.PROJECT
DISABLE = "FLEXHEADS_DISABLE_PLUGINS"
STRICT = "FLEXHEADS_STRICT_PLUGINS"

BUILTIN_PLUGINS = tuple(f"flexheads.{part}.plugin" for part in ("methods", "heads", "checkpoints"))
"""Modules of the core that register through the same hooks, before any entry point."""

_NAME = r"[^\W\d]\w*"
_REFERENCE = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[A-Za-z0-9.+!]+)?")

Identifier = tuple[AdapterMethodSpec, str, Mapping[str, Any]]
SpecT = TypeVar("SpecT", bound=Spec)


class _Kind(NamedTuple):
    """What a hook collects: the registry's table for it, a label for messages, and the type."""

    table: str
    label: str
    spec: type[Spec]


_KINDS = {
    "flexheads_register_architectures": _Kind("architectures", "architecture", ArchitectureSpec),
    "flexheads_register_head_types": _Kind("head_types", "head type", specs.HeadTypeSpec),
    "flexheads_register_adapter_methods": _Kind("methods", "adapter method", AdapterMethodSpec),
    "flexheads_register_conversions": _Kind("conversions", "conversion", HeadConversion),
    "flexheads_register_checkpoint_formats": _Kind("formats", "format", specs.CheckpointFormat),
}


@dataclass(frozen=True)
class Provider:
    """Who provides specs: a plugin (by entry-point name), its distribution and its module."""

    plugin: str
    distribution: str
    version: str
    module: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"


@dataclass(frozen=True)
class SkippedPlugin:
    """A plugin that is installed but not used, and why."""

    provider: Provider
    reason: str


@dataclass(frozen=True)
class Registry:
    """Everything that the installed plugins provide; immutable, every mapping is read-only.

    Lookups raise `UnknownNameError` with the known names. Their ``provider`` is the distribution
    that wrote a saved file (``"name"`` or ``"name==version"``), for the way out in that error.

    Attributes:
        architectures, head_types, methods, conversions, formats: Specs by name.
        claims: Every name that is taken, ``("head type", "tagging")``, with its provider and spec.
        skipped: Installed plugins that are not used: disabled, broken or not compatible.
    """

    architectures: Mapping[str, ArchitectureSpec]
    head_types: Mapping[str, specs.HeadTypeSpec]
    methods: Mapping[str, AdapterMethodSpec]
    conversions: Mapping[str, HeadConversion]
    formats: Mapping[str, specs.CheckpointFormat]
    claims: Mapping[tuple[str, str], tuple[Provider, Spec]]
    skipped: tuple[SkippedPlugin, ...] = ()

    def architecture(self, name: str, provider: str | None = None) -> ArchitectureSpec:
        """Return the architecture of this name."""
        return self._find(ArchitectureSpec, "architecture", name, provider)

    def architecture_for(self, model_type: str, provider: str | None = None) -> ArchitectureSpec:
        """Return the architecture that answers to a configuration's ``model_type``."""
        guess = canonicalize_name(f"{CORE}-{model_type}")
        package = f"pip install {guess} (a guess) or " if _DISTRIBUTION.fullmatch(guess) else ""
        hint = f"Try {package}pip install '{CORE}[all]'; `{CORE} plugins` lists what is installed."
        return self._find(ArchitectureSpec, "model type", model_type, provider, hint)

    def with_heads(self, class_name: str, provider: str | None = None) -> ArchitectureSpec:
        """Return the architecture whose class with flexible heads has this name."""
        return self._find(ArchitectureSpec, "class with heads", class_name, provider)

    def head_type(self, name: str, provider: str | None = None) -> specs.HeadTypeSpec:
        """Return the head type of this name."""
        return self._find(specs.HeadTypeSpec, "head type", name, provider)

    def method(self, name: str, provider: str | None = None) -> AdapterMethodSpec:
        """Return the adapter method of this name."""
        return self._find(AdapterMethodSpec, "adapter method", name, provider)

    def method_for_tag(self, tag: str, provider: str | None = None) -> AdapterMethodSpec:
        """Return the adapter method whose saved configurations carry this tag."""
        return self._find(AdapterMethodSpec, "adapter method tag", tag, provider)

    def identifier(self, name: str, provider: str | None = None) -> Identifier:
        """Return the method, the configuration reference and the fields behind a short name."""
        spec = self._find(AdapterMethodSpec, "adapter identifier", name, provider)
        return spec, *spec.identifiers[name]

    def conversion(self, static_class: str, provider: str | None = None) -> HeadConversion:
        """Return the conversion of a static transformers class."""
        return self._find(HeadConversion, "conversion", static_class, provider)

    def conversions_for(self, architecture: str) -> tuple[HeadConversion, ...]:
        """Return every conversion of an architecture; none is not an error."""
        return tuple(c for c in self.conversions.values() if c.architecture == architecture)

    def format(self, name: str, provider: str | None = None) -> specs.CheckpointFormat:
        """Return the checkpoint format of this name."""
        return self._find(specs.CheckpointFormat, "format", name, provider)

    def provider_of(self, spec: Spec) -> Provider:
        """Return who provided a spec of this registry."""
        label = _label(spec)
        self._find(type(spec), label, spec.name)
        return self.claims[label, spec.name][0]

    def _find(
        self, kind: type[SpecT], label: str, name: str, provider: str | None = None, hint: str = ""
    ) -> SpecT:
        _, spec = self.claims.get((label, name), (None, None))
        if isinstance(spec, kind):
            return spec
        known = (taken for what, taken in self.claims if what == label)
        if provider and _DISTRIBUTION.fullmatch(provider):  # a file's word: no shell, no address
            hint += f" The file was written by {provider}: pip install --upgrade {provider}."
        if self.skipped:
            reasons = "; ".join(f"{s.provider}: {s.reason}" for s in self.skipped)
            hint += f" Installed but not loaded: {reasons}."
        raise UnknownNameError(label, name, known, hint.strip())


def registry() -> Registry:
    """Return what is installed: `load_registry()`, called once for all threads."""
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
    if _LOADING.get():
        raise PluginError("the registry was asked for while it loads; a plugin must not use it")
    token = _LOADING.set(True)
    try:
        return _load(os.environ if environ is None else environ, builtins)
    finally:
        _LOADING.reset(token)


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
        for kind in _KINDS.values()
    }
    claims = {claim: (provider, spec) for provider, spec in loaded for claim in _claims(spec)}
    return Registry(**tables, claims=MappingProxyType(claims), skipped=tuple(skipped))


def _installed() -> list[tuple[Provider, Callable[[], list[Spec]]]]:
    found = []
    for point in importlib.metadata.entry_points(group=CORE):
        if dist := point.dist:  # importlib.metadata sets it on every installed entry point
            provider = Provider(point.name, dist.name, dist.version, point.value.split(":")[0])
            found.append((provider, functools.partial(_read, point.load, dist.requires or ())))
    return sorted(found, key=lambda candidate: str(candidate[0]))


def _read(load: Callable[[], object], requires: Iterable[str] = ()) -> list[Spec]:
    """Check, import and ask one plugin: all that it registers, or an error."""
    if unmet := list(_unmet(requires)):
        raise PluginError("; ".join(unmet))
    found = list(_ask(load()))
    if faults := _faults(found):
        raise PluginError("; ".join(faults))
    return found


def _unmet(requires: Iterable[str]) -> Iterator[str]:
    """Yield the requirements on the core and on transformers that are not met.

    A core without metadata (used straight from its sources) has no version to hold against.
    """
    for requirement in map(Requirement, requires):
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name not in (CORE, "transformers") or (marker and not marker.evaluate({"extra": ""})):
            continue
        version = _version(name)
        met = requirement.specifier.contains(version, prereleases=True) if version else name == CORE
        if not met:
            yield f"it requires {name}{requirement.specifier}; installed is {version or 'none'}"


def _ask(plugin: object) -> Iterator[Spec]:
    """Call each hook of one plugin, in a manager of its own, and consume what it returns."""
    manager = pluggy.PluginManager(CORE)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    callers = manager.get_hookcallers(plugin) or []
    unmarked = [n for n in _KINDS if hasattr(plugin, n) and n not in {c.name for c in callers}]
    if unmarked or not callers:
        raise PluginError(f"it needs @{CORE}.hookimpl on {unmarked or 'at least one function'}")
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if caller.name in _KINDS:
                yield from _call(caller.name, implementation.function)
            elif not implementation.optionalhook:
                raise UnknownNameError("hook", caller.name, _KINDS)


def _call(hook: str, implementation: Callable[..., Any]) -> list[Spec]:
    try:
        found = list(implementation())
    except (Exception, SystemExit) as error:
        raise PluginError(f"{hook} raised {_reason(error)}") from error
    expected = _KINDS[hook].spec
    for spec in found:
        if not isinstance(spec, expected):
            raise PluginError(f"{hook} gave {spec!r}, which is not of type {expected.__name__}")
    return found


def _faults(found: Sequence[Spec]) -> list[str]:
    """List the fields that are not what their annotations say; if none, the names misused."""
    fields = [(s, field) for s in found for field in ("model_types", "layers", "heads")]
    loose = [(s, field) for s, field in fields if not isinstance(getattr(s, field, ()), tuple)]
    faults = [f"{_label(s)} {s.name!r}: {field} is not a tuple" for s, field in loose]
    wrong = [(s, r) for s in found for r in _references(s) if not _REFERENCE.fullmatch(str(r))]
    faults += [f"{_label(s)} {s.name!r}: {r!r} is not of the form 'module:attr'" for s, r in wrong]
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


def _label(spec: Spec) -> str:
    return next(kind.label for kind in _KINDS.values() if isinstance(spec, kind.spec))


def _claims(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield the names that only one plugin may give, as ``(label, name)``."""
    yield _label(spec), spec.name
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


def _version(distribution: str) -> str | None:
    return next((d.version for d in importlib.metadata.distributions(name=distribution)), None)
