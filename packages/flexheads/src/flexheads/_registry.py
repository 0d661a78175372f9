"""The registry: an immutable value that holds everything the installed plugins provide."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flexheads import specs
from flexheads.errors import UnknownNameError
from flexheads.hookspecs import PROJECT
from flexheads.specs import AdapterMethodSpec, ArchitectureSpec, HeadConversion, Spec

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[A-Za-z0-9.+!]+)?")

Identifier = tuple[AdapterMethodSpec, str, Mapping[str, Any]]
SpecT = TypeVar("SpecT", bound=Spec)


class Kind(NamedTuple):
    """What a hook collects: the registry's table for it, a label for messages, and the type."""

    table: str
    label: str
    spec: type[Spec]


KINDS = {
    "flexheads_register_architectures": Kind("architectures", "architecture", ArchitectureSpec),
    "flexheads_register_head_types": Kind("head_types", "head type", specs.HeadTypeSpec),
    "flexheads_register_adapter_methods": Kind("methods", "adapter method", AdapterMethodSpec),
    "flexheads_register_conversions": Kind("conversions", "conversion", HeadConversion),
    "flexheads_register_checkpoint_formats": Kind("formats", "format", specs.CheckpointFormat),
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

    @property
    def requirement(self) -> str:
        """What pip installs, as saved files name it: ``"name==version"``."""
        return f"{self.distribution}=={self.version}"


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

        def hint() -> str:
            way = _way_to_architecture(model_type)
            return f"{way} `{PROJECT} plugins` lists what is installed."

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
        label = label_of(spec)
        self._find(type(spec), label, spec.name)
        return self.claims[label, spec.name][0]

    def _find(
        self,
        kind: type[SpecT],
        label: str,
        name: str,
        provider: str | None = None,
        way_out: Callable[[], str] = str,
    ) -> SpecT:
        _, spec = self.claims.get((label, name), (None, None))
        if isinstance(spec, kind):
            return spec
        hint = way_out()
        known = (taken for what, taken in self.claims if what == label)
        if provider and _DISTRIBUTION.fullmatch(provider):  # a file's word: no shell, no address
            hint += f" The file was written by {provider}: pip install --upgrade {provider}."
        if self.skipped:
            reasons = "; ".join(f"{s.provider}: {s.reason}" for s in self.skipped)
            hint += f" Installed but not loaded: {reasons}."
        raise UnknownNameError(label, name, known, hint.strip())


def _way_to_architecture(model_type: str) -> str:
    """What to install for a model type; what to write where no package of ours is for it."""
    name = canonicalize_name(model_type)
    own = [package for package in first_party() if _is_for(package, name)]
    if own:
        return f"Try: pip install {max(own, key=len)}."
    guess = canonicalize_name(f"{PROJECT}-{model_type}")
    package = f"pip install {guess} (a guess) or " if _DISTRIBUTION.fullmatch(guess) else ""
    return (
        f"Try {package}pip install '{PROJECT}[all]'. Where there is no package, "
        f"print({PROJECT}.describe(model)) with a small model of transformers' own class is a "
        "specification to start one from."
    )


def _is_for(package: str, model_type: str) -> bool:
    """Whether a package has the name of a model type, of its first part, or of its last one.

    So that of "acme" is for "acme-v2", "acme3_text" and "xl-acme", and not for "subacme".
    """
    family = package.removeprefix(f"{PROJECT}-")
    return re.fullmatch(rf"(.*-)?{re.escape(family)}\d*(-.*)?", model_type) is not None


def package_for(class_name: str) -> str:
    """The package whose name a class with heads begins with; a guess where none of ours has it."""
    word = class_name.removesuffix("ModelWithHeads").lower()
    begins = [p for p in first_party() if word.startswith(p.partition("-")[2].replace("-", ""))]
    return max(begins, key=len, default=f"{PROJECT}-{word}")


def first_party() -> tuple[str, ...]:
    """The packages that the core's own extras name."""
    try:
        required = importlib.metadata.requires(PROJECT) or ()
    except importlib.metadata.PackageNotFoundError:  # used straight from its sources
        return ()
    names = {canonicalize_name(Requirement(line).name) for line in required if "extra ==" in line}
    return tuple(sorted(name for name in names if name.startswith(f"{PROJECT}-")))


def label_of(spec: Spec) -> str:
    """What a kind of spec is called in messages."""
    return next(kind.label for kind in KINDS.values() if isinstance(spec, kind.spec))
