"""A module that holds modules under names that are data: any string is legal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch import nn

from flexheads.errors import UnknownNameError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def all_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module in any order, and repeatedly where several places hold one.

    With many adapters, ``module.parameters()`` takes most of its time to name and to compare them.
    """
    inside: list[nn.Module | None] = [module]
    while inside:
        one = inside.pop()
        if one is not None:
            inside += one._modules.values()
            yield from (p for p in one._parameters.values() if p is not None)


class NamedModules(nn.Module, Generic[ModuleT]):
    """Modules by name, in the order in which they were added.

    Names with a dot, empty names and names of this class's own attributes cannot be names of
    child modules, so they are escaped there, and so are numbers, which transformers 5.0 cannot
    sort beside words when it loads. Everywhere else the name is used as it is.

    Args:
        kind: What it holds, for messages: ``"adapter"`` or ``"head"``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._names: dict[str, str] = {}

    def put(self, name: str, module: ModuleT) -> None:
        """Adds a module, or replaces the one of that name in its place."""
        self._names.setdefault(name, self.key(name))
        self._modules[self._names[name]] = module

    def drop(self, name: str) -> ModuleT:
        """Removes and returns a module.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        module = self[name]
        del self._modules[self._names.pop(name)]
        return module

    def key(self, name: str) -> str:
        """The child name that stands for a name; the first word of its tensors' keys."""
        escaped = name.replace("%", "%25").replace(".", "%2E")
        taken = hasattr(type(self), escaped) or escaped in self.__dict__
        return f"%{escaped}" if taken or not escaped or escaped.isdigit() else escaped

    def __getitem__(self, name: str) -> ModuleT:
        if name not in self._names:
            raise UnknownNameError(self.kind, name, self._names)
        return self._modules[self._names[name]]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self._names)

    def values(self) -> tuple[ModuleT, ...]:
        """The modules, in order."""
        modules: dict[str, Any] = self._modules
        return tuple([modules[key] for key in self._names.values()])

    def items(self) -> tuple[tuple[str, ModuleT], ...]:
        """Names and modules, in order."""
        return tuple(zip(self._names, self.values(), strict=True))
