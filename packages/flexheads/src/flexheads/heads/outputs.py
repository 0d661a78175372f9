"""What heads return, and what a call with several heads does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    return kind(**own, **{name: backbone.get(name) for name in fields if name not in own})


class MultiHeadOutput(dict[str, Any]):
    """The outputs of several heads, by name and by index.

    ``output["topic"]`` and ``output[0]`` give the output of one head; ``output.loss`` is the sum of
    the losses of those heads that had labels, or None. As a mapping it holds the outputs by name;
    ``output["loss"]`` is the summed loss, which is where trainers look for it.

    Args:
        outputs: Head name and output, in order.
    """

    def __init__(self, outputs: Any = ()) -> None:
        pairs: Sequence[tuple[str, Any]] = list(
            dict(outputs).items() if isinstance(outputs, dict) else outputs
        )
        self.ordered: tuple[Any, ...] = tuple(output for _, output in pairs)
        self.head_names: tuple[str, ...] = tuple(name for name, _ in pairs)
        super().__init__()
        for name, output in pairs:
            super().setdefault(name, output)

    @property
    def loss(self) -> Tensor | None:
        """The sum of the losses, or None where no head had labels."""
        losses = [
            o["loss"]
            for o in self.ordered
            if isinstance(o, ModelOutput) and o.get("loss") is not None
        ]
        return sum(losses[1:], losses[0]) if losses else None

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return self.ordered[key]
        if key == "loss" and "loss" not in self.head_names:
            return self.loss
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (key == "loss" and self.loss is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(zip(self.head_names, self.ordered, strict=True)),)
