"""What heads return, and what a call with several heads does."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.utils.generic import ModelOutput

_OF_TWO_SIDES: dict[type[ModelOutput], type[ModelOutput]] = {
    SequenceClassifierOutput: Seq2SeqSequenceClassifierOutput,
    QuestionAnsweringModelOutput: Seq2SeqQuestionAnsweringModelOutput,
}


def head_output(kind: type[ModelOutput], backbone: Any, **own: Any) -> Any:
    """A head's output, with what the backbone has computed of its fields.

    Args:
        kind: The output class; an encoder-decoder backbone gets that of two sides.
        backbone: The backbone's output.
        own: The fields that the head computes.
    """
    if "encoder_last_hidden_state" in backbone:
        kind = _OF_TWO_SIDES.get(kind, kind)
    # The plain attribute, because compiling does not see through dataclasses.fields.
    fields: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    values = {name: own[name] if name in own else backbone.get(name) for name in fields}
    return _built(kind, values) if own.keys() <= fields.keys() else kind(**values, **own)


def _built(kind: type[ModelOutput], values: Mapping[str, Any]) -> Any:
    """``kind(**values)``; after the first time without the checks that the class makes each time.

    With many heads in one call, those take longer than the heads.
    """
    if torch.compiler.is_compiling():  # what was built before must not be part of the graph
        return kind(**values)
    usual = kind.__post_init__ is ModelOutput.__post_init__
    if kind not in _BUILT or not usual:
        _BUILT.add(kind)
        return kind(**values)
    return _unchecked(kind, values)


def with_logits(output: Any, logits: Tensor) -> Any:
    """A copy of a head's output with other scores."""
    return _unchecked(type(output), {**output.__dict__, "logits": logits})


def _unchecked(kind: type[ModelOutput], values: Mapping[str, Any]) -> Any:
    output = kind.__new__(kind)
    for name, value in values.items():
        output.__dict__[name] = value
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


_BUILT: set[type[ModelOutput]] = set()


class MultiHeadOutput(dict[str, Any]):
    """The outputs of several heads, by name and by index.

    ``output["topic"]`` and ``output[0]`` give the output of one head. As a mapping it holds the
    loss, where there is one, and the outputs by name, which is where trainers look for both.

    Args:
        outputs: Head name and output, in order; a tensor named ``"loss"`` among them is the loss.
        loss: The loss of all heads together; None takes the sum of the losses of those heads that
            had labels.

    Attributes:
        ordered: The outputs, in order.
        head_names: The heads' names, in the same order.
        loss: The loss of all heads together, or None where no head had labels.
        losses: The loss of each head that had labels, as the head computed it, without a weight.
    """

    def __init__(self, outputs: Any = (), loss: Tensor | None = None) -> None:
        pairs = list(outputs.items() if isinstance(outputs, Mapping) else outputs)
        # Libraries that convert outputs, as for mixed precision, build them anew from their items.
        for total in (value for name, value in pairs if name == "loss" and _is_tensor(value)):
            loss = total if loss is None else loss
        pairs = [pair for pair in pairs if pair[0] != "loss" or not _is_tensor(pair[1])]
        self.ordered: tuple[Any, ...] = tuple(output for _, output in pairs)
        self.head_names: tuple[str, ...] = tuple(name for name, _ in pairs)
        self.losses = _first_of_each((name, _loss(output)) for name, output in pairs)
        if loss is None and self.losses:
            own = [one for one in map(_loss, self.ordered) if one is not None]
            loss = sum(own[1:], own[0])
        self.loss: Tensor | None = loss
        super().__init__({**_first_of_each([("loss", loss)]), **_first_of_each(pairs)})

    def __getitem__(self, key: str | int) -> Any:
        return self.ordered[key] if isinstance(key, int) else super().__getitem__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(zip(self.head_names, self.ordered, strict=True)), self.loss)

    @staticmethod
    def when_read(make: Callable[[], Iterable[tuple[str, Any]]]) -> MultiHeadOutput:
        """The same of heads without labels, whose outputs are made when the first one is read.

        Args:
            make: Makes head names and outputs.
        """
        output = _Unread.__new__(_Unread)
        output.make, output.loss, output.losses = make, None, {}
        return output


class _Unread(MultiHeadOutput):
    """A `MultiHeadOutput` into which nobody has looked; when somebody does, it is a usual one."""

    make: Callable[[], Iterable[tuple[str, Any]]]

    def __init__(self, outputs: Any = (), loss: Tensor | None = None) -> None:
        super().__init__(outputs, loss)
        self.__class__ = MultiHeadOutput  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name not in ("ordered", "head_names"):
            raise AttributeError(f"{MultiHeadOutput.__name__!r} object has no attribute {name!r}")
        _read(self)
        return getattr(self, name)


def _read(output: MultiHeadOutput) -> None:
    """Makes the outputs, if nobody has; threads may do so at once."""
    if (make := vars(output).get("make")) is not None:
        MultiHeadOutput.__init__(output, make())
        output.__class__ = MultiHeadOutput
        vars(output).pop("make", None)


_READING = (
    *("__contains__", "__getitem__", "__iter__", "__len__", "__reversed__"),
    *("__delitem__", "__setitem__", "__eq__", "__ne__", "__or__", "__ror__", "__ior__"),
    *("__repr__", "__reduce__", "__reduce_ex__", "copy", "get", "items", "keys", "values"),
    *("clear", "pop", "popitem", "setdefault", "update"),
)
"""What looks into a dictionary."""


def _reading(name: str) -> Callable[..., Any]:
    """A method of a `MultiHeadOutput` that makes the outputs before it does anything."""
    usual = getattr(MultiHeadOutput, name)

    @functools.wraps(usual)
    def method(self: _Unread, *args: Any, **kwargs: Any) -> Any:
        _read(self)
        return usual(self, *args, **kwargs)

    return method


for _name in _READING:
    setattr(_Unread, _name, _reading(_name))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _loss(output: Any) -> Tensor | None:
    """The loss in a head's output, if there is one."""
    return output.get("loss") if isinstance(output, ModelOutput) else None


def _first_of_each(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The first value of each name; None does not count."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if value is not None:
            found.setdefault(name, value)
    return found
