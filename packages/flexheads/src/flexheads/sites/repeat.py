"""Where rows are repeated for `Parallel`: before the first layer in which its branches differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from flexheads.plan import Plan
from flexheads.sites.base import CALL, Hooks, argument_names, first_argument
from flexheads.sites.caches import change_rows, fills_by_layer
from flexheads.sites.hooking import hook_before
from flexheads.sites.joining import undoing
from flexheads.sites.recording import listening
from flexheads.sites.runtime import ONCE, Runtime

REPEAT = "repeat"
"""Stands for the address of these hooks, which belong to no site."""

WITHOUT_ROWS = ("cache_position", "head_mask")
"""Inputs whose first dimension is not that of the batch, whatever its size."""

_READ = (  # by what these have, rows are counted
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "input_values",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)
_CALLED = "call"


class Repeater:
    """Runs the layers in which all branches of `Parallel` are alike on one copy of the batch.

    The model's forward repeats its inputs, because heads read them too. Where the plan names a
    layer, the backbone is given the first copy only, and every tensor with the rows of the batch is
    repeated where that layer begins. What has been recorded of the layers before, hidden states,
    attentions and a new cache, is repeated behind the backbone, so outputs are as ever.

    A cache that is still empty gets the rows of one copy from the layers before, and is repeated
    behind the backbone too. So the first call of a generation, whose inputs hold all copies from
    the beginning, shares layers. A call that goes on from a cache repeats at the entry of the
    model: what its layers hold has the rows of all branches already.

    Hooks: ``call`` before and behind the backbone, and the number of a layer before that layer.

    Args:
        runtime: What is in force.
        called: What is called with the backbone's inputs.
        layers: The layers in the order in which they run; empty where branches cannot share them.
        start: The first layer before which rows can be repeated. Beside an encoder that is the
            first one of the decoder, whose masks need the rows of the encoder's result.
        inside: Whether the model itself is another module, so that hooks at `called` run under the
            plan of the call; otherwise the model calls `run`.
    """

    def __init__(
        self,
        runtime: Runtime,
        called: nn.Module,
        layers: Sequence[nn.Module],
        start: int,
        inside: bool,
    ) -> None:
        self.runtime, self.called, self.inside = runtime, called, inside
        self.start = max(start, 1)  # before the very first layer nothing can be gained
        self.entries = [_Entry(runtime, number, layer) for number, layer in enumerate(layers)]
        self.names = argument_names(type(called).forward)
        self.skipped: int | None = None
        self.live = False

    def needed(self, first_layer: int | None) -> Hooks:
        """The hooks that can be of use for an adapter.

        What tells branches apart has to begin so high up that layers below can be shared.

        Args:
            first_layer: The first layer in which it acts, or None.
        """
        if first_layer is None or not self.start <= first_layer < len(self.entries):
            return frozenset()
        numbers = map(str, range(first_layer, len(self.entries)))
        return frozenset((REPEAT, hook) for hook in (_CALLED, *numbers))

    def skip(self, layers: Sequence[int]) -> bool:
        """Takes notice that nothing acts in some layers; tells whether that asks for more hooks.

        Hooks that have been asked for once stay, because calls that rely on them may be running.
        """
        first = next(number for number in range(len(layers) + 1) if number not in layers)
        if not self.needed(first) or (self.skipped is not None and self.skipped <= first):
            return False
        self.skipped = first
        return True

    def can_begin(self, layer: int) -> bool:
        """Whether rows can be repeated before a layer."""
        return layer >= self.start and self.live and self.entries[layer].live

    def register(self, hook: str) -> RemovableHandle:
        """Registers the hook of that name."""
        if hook != _CALLED:
            return self.entries[int(hook)].register()
        self.live, handles = True, []
        if self.inside:  # in front of all others, which see the rows that the layers see
            handles = [
                hook_before(self.called, self._before, first=True),
                self.called.register_forward_hook(self._after, prepend=True),
            ]
        return undoing(handles, self._leave)

    def _leave(self) -> None:
        self.live = False

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward of a model that is its own backbone, under the plan of the call.

        Args:
            forward: Takes the arguments by position, and those by name.
            args: The arguments by position.
            kwargs: The arguments by name.
        """
        if not self.live or self.inside:
            return forward(args, kwargs)
        output = forward(*(self._before(self.called, args, kwargs) or (args, kwargs)))
        changed = self._after(self.called, args, output)
        return output if changed is None else changed

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Takes one copy of the inputs; None where the call repeats them at the model's entry."""
        plan = self.runtime.entered()
        if plan is None or plan.repeat_at is None or listening():
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if (times := _copies(plan, given)) == 1:
            return None
        once = Once(batch_size(given) // times, times, given.get("past_key_values"))
        self.runtime.put(ONCE, once)
        if (call := self.runtime.peek(CALL)) is not None:  # noted before the rows are fewer
            self.runtime.put(CALL, once.first(call))
        return (), once.first(given)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Repeats what the output has of the layers before; None where nothing is to be done."""
        once: Once | None = self.runtime.take(ONCE)
        if once is None:
            return None
        once.everywhere(once.cache)  # which the output need not name
        return once.everywhere(output)


def _copies(plan: Plan, given: Mapping[str, Any]) -> int:
    """How many equal copies of a batch the inputs hold, of which the backbone needs but one."""
    cache = given.get("past_key_values")
    if cache is not None and not fills_by_layer(cache):
        return 1
    if plan.copies == 1:
        return plan.routing.repeat
    # Only the first call of a generation is sure to have equal rows: that with an empty cache, or
    # where the backbone is to make one. Who calls the model inside of it may have other rows.
    first = cache is not None or bool(given.get("use_cache"))
    return plan.copies if first and _are_copies(given, plan.copies) else 1


def _are_copies(given: Mapping[str, Any], times: int) -> bool:
    """Whether inputs hold the same rows so many times, one batch behind the other."""
    whole = batch_size(given)
    if whole % times or torch.compiler.is_compiling():  # compiled code must not ask for values
        return False
    return all(
        torch.equal(value, tile(value[: whole // times], times))
        for name, value in given.items()
        if has_rows(name, value) and len(value) == whole
    )


class _Entry:
    """The hook before one layer."""

    def __init__(self, runtime: Runtime, number: int, layer: nn.Module) -> None:
        self.runtime, self.number, self.layer = runtime, number, layer
        self.names = argument_names(type(layer).forward)
        self.live = False

    def register(self) -> RemovableHandle:
        """Registers the hook."""
        self.live = True
        handle = hook_before(self.layer, self.before)
        return undoing([handle], self._leave)

    def _leave(self) -> None:
        self.live = False

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Repeats what still has the rows of one copy."""
        once: Once | None = self.runtime.peek(ONCE)
        if once is None:
            return None
        plan = self.runtime.current()
        if plan.repeat_at is None or self.number < plan.repeat_at:
            return None
        hidden = first_argument(args, kwargs)
        if hidden.shape[0] == once.rows and (call := self.runtime.peek(CALL)) is not None:
            self.runtime.put(CALL, once.noted(call))
        names = (*self.names, *("",) * len(args))
        return (
            tuple(once.given(n, value, hidden) for n, value in zip(names, args, strict=False)),
            {name: once.given(name, value, hidden) for name, value in kwargs.items()},
        )


class Once:
    """Repeats the tensors that have the rows of one copy of the batch; others stay as they are.

    Args:
        rows: Rows of one copy.
        times: How many copies there shall be.
        cache: A cache that the layers fill, if one is given.
    """

    def __init__(self, rows: int, times: int, cache: Any = None) -> None:
        self.rows, self.times, self.cache = rows, times, cache
        self.known: list[tuple[Tensor, Tensor]] = []

    def first(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The first copy in the inputs of a model, which hold all of them."""
        whole = self.rows * self.times
        return {name: self._first(name, value, whole) for name, value in inputs.items()}

    def _first(self, name: str, value: Any, whole: int) -> Any:
        if isinstance(value, ModelOutput):
            return type(value)(**{key: self._first(key, own, whole) for key, own in value.items()})
        if type(value) in (tuple, list):
            return type(value)(self._first(name, inner, whole) for inner in value)
        return value[: self.rows] if has_rows(name, value) and len(value) == whole else value

    def given(self, name: str, value: Any, hidden: Tensor) -> Any:
        """An argument of a layer.

        Args:
            name: Its name.
            value: It; tensors may lie in tuples, lists and dictionaries.
            hidden: The hidden states, which the layer is given too.
        """
        if isinstance(value, Tensor):
            if value is hidden:  # used up at once, so not worth being kept
                return self._tile(value) if value.shape[0] == self.rows else value
            return self._kept(value) if self._carries_rows(name, value) else value
        if type(value) in (tuple, list):
            return type(value)(self.given(name, inner, hidden) for inner in value)
        if type(value) is dict:
            return {key: self.given(name, inner, hidden) for key, inner in value.items()}
        return value

    def _carries_rows(self, name: str, tensor: Tensor) -> bool:
        """Whether the first dimension is that of the batch, and not just as large.

        Numbers with one or two dimensions are tables of positions, which all rows share; and what
        there is once may stay so, as it is for any batch.
        """
        if tensor.dim() < 2 or tensor.shape[0] != self.rows or name in WITHOUT_ROWS:
            return False
        if "mask" in name or "states" in name:
            return True
        return self.rows > 1 and (tensor.dim() > 2 or not tensor.is_floating_point())

    def _kept(self, tensor: Tensor) -> Tensor:
        """A tensor repeated, once for all layers that are given the same."""
        # What has gradients belongs to the layer that computes it anew with checkpointing.
        if tensor.requires_grad or torch.compiler.is_compiling():
            return self._tile(tensor)
        for given, repeated in self.known:
            if given is tensor:
                return repeated
        repeated = self._tile(tensor)
        self.known.append((tensor, repeated))
        return repeated

    def noted(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What has been noted of a call's inputs, for sites behind; see `CallInputs`."""
        found: dict[str, Any] = {}
        for name, value in call.items():
            if has_rows(name, value) and len(value) == self.rows:
                found[name] = self._tile(value)
            elif name != "tokens":
                found[name] = self.noted(value) if type(value) is dict else value
        return found

    def everywhere(self, value: Any) -> Any:
        """An output in which every tensor with the rows of one copy has those of all."""
        if isinstance(value, Tensor):
            return self._tile(value) if value.dim() > 1 and len(value) == self.rows else value
        if isinstance(value, ModelOutput):
            return type(value)(**{name: self.everywhere(own) for name, own in value.items()})
        if type(value) in (tuple, list):
            return type(value)(self.everywhere(inner) for inner in value)
        change_rows(value, self.everywhere)
        return value

    def _tile(self, tensor: Tensor) -> Tensor:
        return tile(tensor, self.times)


def tile(tensor: Tensor, times: int) -> Tensor:
    """Copies of a batch, one whole behind the other: ``(rows, ...)`` to ``(times * rows, ...)``."""
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch: the first dimension of what a model reads, or of another tensor."""
    names = (*(name for name in _READ if name in inputs), *inputs)
    return next((len(inputs[name]) for name in names if has_rows(name, inputs[name])), 0)


def has_rows(name: str, value: Any) -> bool:
    """Whether an input of a model is a tensor that has rows."""
    return isinstance(value, Tensor) and value.dim() > 0 and name not in WITHOUT_ROWS
