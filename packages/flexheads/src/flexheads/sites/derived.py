"""What is computed from weights alone, kept from one inference call to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


class Notes:
    """What was found out since a call began.

    Attributes:
        checked: What was found to be as it was.
        found: What others have found, by keys of their own.
    """

    def __init__(self) -> None:
        self.checked: set[_Kept[Any]] = set()
        self.found: dict[Any, Any] = {}


class _Call(threading.local):
    """What each thread knows of the call that it is in; no notes outside of any."""

    def __init__(self) -> None:
        self.notes: Notes | None = None


_call = _Call()


def enter_call() -> Notes | None:
    """Begins a call, in which one look at each weight is enough; gives what `leave_call` takes."""
    around: Notes | None = None
    if not torch.compiler.is_compiling():
        around, _call.notes = _call.notes, Notes()
    return around


def leave_call(around: Notes | None) -> None:
    """Ends a call, inside of the one around it."""
    if not torch.compiler.is_compiling():
        _call.notes = around


def notes() -> Notes | None:
    """What was found out in the call that this thread is in; None outside of any call."""
    return _call.notes


class Derived(Generic[T]):
    """A value that is computed from the weights of modules, kept until one of them changes.

    It is kept between calls that only infer: no module is in training mode, no gradient of its
    weights is wanted, and nothing traces, transforms or watches the computation. In any other call
    there is none, and what was kept is forgotten, because optimizers may write to weights in ways
    that leave no trace. Kept tensors need no gradient and can be used outside of inference mode.

    A change of a weight is noticed by its identity, its memory and its version, and by the steps of
    optimizers; only writing to the ``.data`` of one in place is not noticed. Replacing a module or
    a weight, and hooks on a module, are noticed too. All of this is looked at once in a call of the
    model. Threads may use it at once; at worst they compute the value twice. Copies and pickles of
    it are empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept[T] | None = None
        self._together: Sequence[Derived[Any]] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def get(
        self,
        modules: tuple[nn.Module, ...],
        compute: Callable[[], T],
        *attributes: str,
        read: tuple[nn.Module, ...] = (),
    ) -> T | None:
        """The value; None where it must not be kept now, so that the caller computes otherwise.

        Args:
            modules: The modules that it stands in for, with all that is in them.
            compute: Computes it.
            attributes: Names of what else of them it is computed from, beside their tensors.
            read: Modules whose own tensors it is computed from too, but which run by themselves.
        """
        if torch.compiler.is_compiling():
            return None
        kept, noted = self._kept, _call.notes
        known = kept is not None and noted is not None and kept in noted.checked
        if kept is None or not known or not kept.is_of(modules, read):
            sources = Sources(modules, read, attributes)
            kept = None if watched() else self._looked_at(sources, compute)
        return None if kept is None else kept.value

    def _looked_at(self, sources: Sources, compute: Callable[[], T]) -> _Kept[T] | None:
        kept = self._kept
        if kept is None or not kept.is_of(sources.modules, sources.read) or not kept.holds():
            kept = self._kept = _keep(sources, compute)
        noted = _call.notes
        if kept is not None and noted is not None:
            noted.checked.add(kept)
            others = (other._kept for other in self._together)
            noted.checked.update(other for other in others if other is not None and other.holds())
        return kept


class Sources(NamedTuple):
    """What a value is computed from; see `Derived.get`."""

    modules: tuple[nn.Module, ...]
    read: tuple[nn.Module, ...]
    attributes: tuple[str, ...]


def look_together(derived: Iterable[Derived[Any]]) -> None:
    """Has values looked at together: in a call all of them where the first is asked for.

    Between the layers of a model, whose weights fill the caches of the machine, each look costs
    several times as much.
    """
    together = tuple(derived)
    for one in together:
        one._together = together


class _Steps:
    """The last step of an optimizer that leaves no trace at the weights."""

    last: object = None


def _note_step(optimizer: torch.optim.Optimizer, *given: object) -> None:
    if torch.compiler.is_compiling() or not _leaves_traces(optimizer):
        _Steps.last = object()


def _leaves_traces(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is known to change the version of what it writes to."""
    usual = type(optimizer).__module__.startswith("torch.optim.")
    return usual and not any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_note_step)


class Snapshot:
    """Tensors as they are now, to tell later whether one of them has changed.

    Args:
        tensors: The tensors; none was made in inference mode.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        # A detached tensor keeps the memory, so that nothing else can get its address.
        self._memory = [tensor.detach() for tensor in tensors]
        self._step, self._state = _Steps.last, self._read()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and none has changed since.

        Writing to the ``.data`` of one in place is not noticed.
        """
        if self._step is not _Steps.last:
            return False
        if not _same(tensors, self._tensors):
            return False
        self._tensors = tensors  # the same object next time is found out at once
        return self._state == self._read()

    def _read(self) -> list[int]:
        versions = map(attrgetter("_version"), self._tensors)
        return [*versions, *map(Tensor.data_ptr, self._tensors)]


class _Kept(Generic[T]):
    """A value, and what has to be as it was when the value was computed."""

    def __init__(self, sources: Sources) -> None:
        self._hooks = RemovableHandle.next_id
        self._sources, self._modules = sources, _all_of(sources.modules)
        places: list[tuple[dict[str, Any], str]] = [
            (held, key)
            for module in (*self._modules, *sources.read)
            for held in (module._modules, module._parameters, module._buffers)
            for key in held
        ]
        own = ("training", "forward", *sources.attributes)
        places += [(module.__dict__, name) for module in self._modules for name in own]
        places += [(m.__dict__, name) for m in sources.read for name in sources.attributes]
        self._owners, self._keys = zip(*places, strict=True)
        self._held = [owner.get(key) for owner, key in places]
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._snapshot = Snapshot(self._tensors)
        self.value: Any = None

    def is_of(self, modules: Sequence[nn.Module], read: Sequence[nn.Module]) -> bool:
        """Whether the value was computed from these."""
        own = self._sources
        return _same(own.modules, modules) and _same(own.read, read)

    def holds(self) -> bool:
        """Whether the value is still right, and may be used in this call."""
        if self._hooks != RemovableHandle.next_id:  # somewhere a hook was registered since
            self._hooks = RemovableHandle.next_id
            if any(map(is_hooked, self._modules)):
                return False
        return (
            all(map(is_, map(dict.get, self._owners, self._keys), self._held))
            and not self.wanted()
            and self._snapshot.holds(self._tensors)
        )

    def wanted(self) -> bool:
        """Whether gradients of the weights are wanted."""
        return wants_gradients(self._tensors)


def _keep(sources: Sources, compute: Callable[[], T]) -> _Kept[T] | None:
    """The value as it has to be computed now; None where it must not be kept."""
    silent = all(map(_is_silent, _all_of(sources.modules)))
    if not silent or not all(map(has_plain_weights, sources.read)):
        return None
    # What is read first is what a change during the computation is noticed by.
    kept: _Kept[T] = _Kept(sources)
    if kept.wanted():
        return None
    # Tensors made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        kept.value = compute()
    return kept


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return some is others or (len(some) == len(others) and all(map(is_, some, others)))


def _all_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [inner for module in modules for inner in module.modules()]


def _is_silent(module: nn.Module) -> bool:
    """Whether nobody would notice that a module does not run: it infers, as its class says."""
    noticed = module.training or "forward" in module.__dict__ or is_hooked(module)
    return not noticed and has_plain_weights(module)


def has_plain_weights(module: nn.Module) -> bool:
    """Whether changes of the tensors of a module itself are noticed."""
    if any(isinstance(value, Tensor) for value in module.__dict__.values()):
        return False  # weights that somebody has put in place of parameters
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return all(tensor is None or is_plain(tensor) for tensor in tensors)


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is a usual one, so that changes of it can be noticed."""
    usual = type(tensor) in (nn.Parameter, Tensor)
    return usual and not tensor.is_inference() and not tensor.is_meta


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook is on a module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def wants_gradients(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients of one of these are wanted."""
    return torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), tensors))


def traced() -> bool:
    """Whether somebody compiles or records what is computed."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def hooked_everywhere() -> bool:
    """Whether hooks on every module are in force, which want to see each of them run."""
    return bool(torch_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def captured() -> bool:
    """Whether a CUDA graph records the call; it would read kept memory when that is long gone."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started and torch.cuda.is_current_stream_capturing())


def watched() -> bool:
    """Whether the call is not a plain one: traced, recorded, transformed, cast, seen by hooks."""
    return (
        traced()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_any_autocast_enabled()
        or hooked_everywhere()
        or captured()
    )
