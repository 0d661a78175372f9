"""What the backbone is called with, and which of its tokens are the first and the last."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import CALL, argument_names
from flexheads.sites.caches import past_length
from flexheads.sites.hooking import hook_before
from flexheads.sites.joining import undoing
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import LayerSpec


class CallInputs:
    """Notes arguments by name; sites read them with ``runtime.peek(CALL)``.

    The hook `CALL` notes those of the backbone. The hook ``CALL.<part>`` notes those of one part of
    a model of several under its own name: a side of an encoder-decoder, or a tower of two. Beside
    the arguments stands ``past_length``, how many positions a cache held when the call began.

    Args:
        runtime: Where they are put.
        backbone: The backbone.
        layers: The backbone's stacks of layers.
        itself: Whether the backbone is the model itself, whose hooks run before it knows the plan
            of the call; so it calls `run`.
    """

    def __init__(
        self,
        runtime: Runtime,
        backbone: nn.Module,
        layers: tuple[LayerSpec, ...] = (),
        itself: bool = False,
    ) -> None:
        self.runtime, self.backbone, self.layers, self.itself = runtime, backbone, layers, itself
        self.own: _Note | None = None

    def register(self, hook: str) -> RemovableHandle:
        """Registers the hook, in front of others, which may change the inputs."""
        part = hook.partition(".")[2]
        host = self._holder(part) if part else self.backbone
        note = _Note(self.runtime, hook, host)
        if not part and self.itself:
            self.own = note
            return undoing([], self._leave)
        return hook_before(host, note.take, first=True)

    def _leave(self) -> None:
        self.own = None

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward of a model that is its own backbone, under the plan of the call.

        Args:
            forward: Takes the arguments by position, and those by name.
            args: The arguments by position.
            kwargs: The arguments by name.
        """
        if self.own is not None:
            self.own.take(self.backbone, args, kwargs)
        return forward(args, kwargs)

    def _holder(self, part: str) -> nn.Module:
        """The module that holds the layers of a part and is called with their inputs."""
        paths = next(layers.path for layers in self.layers if layers.part == part)
        for path in (paths,) if isinstance(paths, str) else paths:
            try:
                self.backbone.get_submodule(path)
            except AttributeError:
                continue
            return self.backbone.get_submodule(path.rpartition(".")[0])
        raise AssertionError(f"The sites of {part} were found, but not its layers.")


class _Note:
    """One hook of `CallInputs`."""

    def __init__(self, runtime: Runtime, name: str, host: nn.Module) -> None:
        self.runtime, self.name = runtime, name
        self.names = argument_names(type(host).forward)

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.runtime.current().ops:
            return
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given["past_length"] = past_length(given.get("past_key_values"))
        if self.name != CALL:
            given = {**(self.runtime.peek(CALL) or {}), self.name: given}
        self.runtime.put(CALL, given)


class Tokens:
    """The tokens of one call, for what acts on the first or the last of each row.

    Tokens are the positions of the attention mask that are not padding, on whichever side that is.
    They are counted over the whole sequence: with a cache, the first ones may be past. The last
    ones are those of the call that starts a sequence; a call that goes on from a cache has none, so
    that generated tokens never become the last ones of a prompt.

    Args:
        mask: The attention mask in any form that transformers takes, or None.
        past: How many positions the cache held when the call began.
    """

    def __init__(self, mask: Any, past: int | Tensor = 0) -> None:
        self.real, self.past = real_positions(mask), past
        self._found: dict[Hashable, Any] = {}

    def edges(self, hidden: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Where the first and the last tokens of each row are.

        Args:
            hidden: Hidden states ``(batch, sequence, ...)`` of these tokens.
            first: How many of the first.
            last: How many of the last.

        Returns:
            The columns ``(batch, first + last)``, and whether each is a token of that row in this
            call. No token comes twice: where a row is short, the last ones win. Where a call goes
            on from a cache, the columns for the last ones are left out.
        """
        key = (first, last, *hidden.shape[:2], hidden.device)
        return self._once(key, lambda: self._edges(hidden, first, last))  # type: ignore[no-any-return]

    def split(self, rows: RowMap, hidden: Tensor) -> list[Tokens]:
        """The tokens of the rows of each chain, in a batch of which these are hidden states."""
        key: Any = rows
        return self._once(key, lambda: self._split(rows, hidden))  # type: ignore[no-any-return]

    def _once(self, key: Hashable, find: Any) -> Any:
        if torch.compiler.is_compiling():  # compilers find equal work by themselves
            return find()
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def _split(self, rows: RowMap, hidden: Tensor) -> list[Tokens]:
        if self.real is None:
            return [self] * len(rows.present(hidden.shape[0]))
        return [Tokens(own, self.past) for own in rows.split(self.real)]

    def _edges(self, hidden: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        batch, length = hidden.shape[:2]
        past, device = self.past, hidden.device
        if isinstance(past, int) and past > 0:
            last = 0
        heads = torch.arange(first, device=device).expand(batch, -1)
        tails = torch.arange(-last, 0, device=device).expand(batch, -1)
        real = self._aligned(length)
        count: Any
        if real is None:
            count = past + length
            ranks = columns = torch.cat([heads, count + tails], dim=1)
        else:
            seen = real.to(device).expand(batch, -1).cumsum(dim=1)
            count = seen[:, -1:]
            ranks = torch.cat([heads, count + tails], dim=1)
            columns = (seen.unsqueeze(1) <= ranks.unsqueeze(2)).sum(dim=2)
        starts: Any = past == 0
        single = (heads < count - last) | (not starts if isinstance(starts, bool) else ~starts)
        fits = torch.cat([single, (tails + count >= 0) & starts], dim=1) & (ranks < count)
        columns = columns - past
        fits = fits & (columns >= 0) & (columns < length)
        return columns.clamp(0, length - 1), fits

    def _aligned(self, length: int) -> Tensor | None:
        """Which positions are tokens, past ones included."""
        real, past = self.real, self.past
        if real is None or not isinstance(past, int):
            return real
        missing = past + length - real.shape[-1]
        if missing <= 0:
            return real
        # Without those in the cache, or without virtual tokens in front, which are none of these.
        return functional.pad(real, (missing, 0), value=past > 0 and real.shape[-1] == length)


def noted(call: Any, side: str | None) -> dict[str, Any] | None:
    """What `CallInputs` has noted of one part of the model; None where that is nothing.

    Args:
        call: What it has noted, or None.
        side: The part of the model; None where there is only one.
    """
    given: dict[str, Any] | None = call
    return given if side is None or given is None else given.get(f"{CALL}.{side}")


def tokens_of(call: Any, side: str | None) -> Tokens:
    """The tokens of one part in what `CallInputs` has noted; all positions where that is nothing.

    Args:
        call: What it has noted, or None.
        side: The part of the model; None where there is only one.
    """
    given = noted(call, side)
    if given is None:
        return Tokens(None)
    known: Tokens | None = given.get("tokens")
    if known is None:
        known = Tokens(given.get("attention_mask"), given["past_length"])
        if not torch.compiler.is_compiling():
            given["tokens"] = known
    return known


def real_positions(mask: Any) -> Tensor | None:
    """Which positions are tokens: ``(batch, sequence)`` of booleans; None for all.

    Masks that transformers has prepared already, ``(batch, 1, queries, keys)``, tell it by what the
    last query sees.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    added = mask.dim() > 2 and mask.is_floating_point()
    while mask.dim() > 2:
        mask = mask[:, -1]
    real: Tensor = mask == 0 if added else mask != 0
    return real
