"""What a model computes in one call: every module's first input and output, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[int, float]
"""What stands for a tensor: its size, and a projection on fixed random numbers, which is linear."""


@dataclasses.dataclass
class Event:
    """One call of one module.

    Attributes:
        path: The module's path in the model.
        module: The module.
        begun, ended: Its place among all beginnings and endings.
        given, made: Its first input and its output (the first of several); None for no tensor.
    """

    path: str
    module: nn.Module
    begun: int
    ended: int = -1
    given: Tensor | None = None
    made: Tensor | None = None

    @property
    def leaf(self) -> bool:
        """Whether it is a module without modules in it."""
        return next(self.module.children(), None) is None

    @property
    def is_norm(self) -> bool:
        """Whether it is a layer norm of any kind."""
        return self.leaf and "norm" in type(self.module).__name__.lower()

    @property
    def is_linear(self) -> bool:
        """Whether it is a projection."""
        plain = hasattr(self.module, "in_features") or hasattr(self.module, "nf")
        return plain and getattr(self.module, "weight", None) is not None


class Trace:
    """The events of one call.

    Args:
        model: The model.
        inputs: Its inputs.
        change: Module to a function of its output, for experiments.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        change: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.events: list[Event] = []
        self._clock, self._open = 0, []  # type: ignore[var-annotated]
        self._change = change or {}
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._begin(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._end))
        try:
            with torch.no_grad():
                self.output: Any = model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, path: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            event = Event(path, module, self._tick(), given=_first((*args, *kwargs.values())))
            self.events.append(event)
            self._open.append(event)

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        event = self._open.pop()
        event.ended = self._tick()
        if module in self._change:
            return self._change[module](output)
        event.made = _first(output if isinstance(output, (tuple, list)) else (output,))
        return None

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def last(self, module: nn.Module) -> Event | None:
        """The last call of a module."""
        return next((e for e in reversed(self.events) if e.module is module), None)

    def inside(self, event: Event) -> list[Event]:
        """The events within another, in the order of their beginnings."""
        return [e for e in self.events if event.begun < e.begun and e.ended < event.ended]


def _first(values: Iterable[Any]) -> Tensor | None:
    """The first value where it is a tensor of numbers; a copy, because some change in place."""
    value = next(iter(values), None)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().clone()
    return None


class Sums:
    """Which tensors of a call are sums of others.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._numbers: dict[int, Tensor] = {}
        self.known = {key for tensor in tensors if (key := self.key(tensor)) is not None}

    def key(self, tensor: Tensor | None) -> Key | None:
        """What stands for a tensor, whatever its shape."""
        if tensor is None:
            return None
        size = tensor.numel()
        if size not in self._numbers:
            generator = torch.Generator().manual_seed(size)
            self._numbers[size] = torch.randn(size, generator=generator, dtype=torch.float64)
        return size, float(tensor.flatten() @ self._numbers[size])

    def same(self, one: Key | None, other: Key | None) -> bool:
        """Whether two stand for the same numbers, but for rounding."""
        if one is None or other is None or one[0] != other[0]:
            return False
        return bool(abs(one[1] - other[1]) <= 1e-4 * one[0] ** 0.25)

    def added(self, *keys: Key) -> Key:
        """What stands for a sum."""
        return keys[0][0], sum(key[1] for key in keys)

    def pairs(self, stream: Key, results: Iterable[Key], totals: Iterable[Key]) -> Iterator[Any]:
        """The results that give one of the totals with a stream, each with that total."""
        totals = list(totals)
        for result in results:
            if result[0] == stream[0] and abs(result[1]) > 1e-6:
                total = self.added(stream, result)
                for known in totals:
                    if self.same(total, known):
                        yield result, known
