"""What every head has in common: its configuration, its features, and its place in files."""

from __future__ import annotations

import dataclasses
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from flexheads.configs import Config
from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads.pooling import pool


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HeadConfig(Config):
    """Base configuration of heads.

    Attributes:
        dropout_prob: Dropout inside the head; None takes the model's own value.
    """

    dropout_prob: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_labels", "num_choices", "layers"):
            value = self.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} should be a whole number, at least 1.")
        function, dropout = self.get("activation_function"), self.dropout_prob
        if not isinstance(function, str | None):
            raise ConfigError(f"activation_function={function!r} should be a name, or None.")
        if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout <= 1):
            raise ConfigError(f"dropout_prob={dropout!r} should be a number from 0 to 1.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LabelledConfig(HeadConfig):
    """Configuration of a head with named labels.

    Attributes:
        num_labels: Size of the output.
        label2id: The name of each label, to its number.
        layers: Number of linear layers.
        activation_function: Activation between them, or None.
    """

    num_labels: int
    label2id: Mapping[str, int] | None = None
    layers: int = 1
    activation_function: str | None = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.label2id, self.num_labels)

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label by its number; ``LABEL_0`` and so on where none was given."""
        if self.label2id is None:
            return {number: f"LABEL_{number}" for number in range(self.num_labels)}
        return {
            number: label for label, number in sorted(self.label2id.items(), key=lambda i: i[1])
        }


class Features:
    """What a head sees of one forward pass.

    Attributes:
        hidden: The last hidden state, ``(batch, sequence, hidden)``.
        pooler_output: The trained pooler's result, ``(batch, hidden)``, or None.
        attention_mask: ``(batch, sequence)``, or None.
        input_ids: ``(batch, sequence)``, or None.
        pooling: What stands for the sequence, see `flexheads.specs.Pooling`.
        pad, eos: The token ids that pad and that end a sequence, or None.
        scale: What language-model heads multiply the hidden states by.
        choices: Choices per example where the input was ``(batch, choices, sequence)``, or None.
        embeddings: The weight of the input embeddings, ``(vocabulary, embedding size)``.
        undo: The inverse of the invertible adapters that were active.
        rescore: Corrects scores from the embeddings for tokens whose rows an adapter replaces.
        output: The backbone's whole output.
        first: Where a prompt stands before the input, the state at the first position of both:
            `pooled` reads it, as the poolers of models do.
    """

    def __init__(
        self,
        output: Any,
        *,
        pooling: str | None = "first_token",
        pad: int | None = None,
        eos: int | None = None,
        scale: float = 1.0,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        choices: int | None = None,
        embeddings: Tensor | None = None,
        undo: Callable[[Tensor], Tensor] | None = None,
        rescore: Callable[[Tensor, Tensor], Tensor] | None = None,
        first: Tensor | None = None,
    ) -> None:
        self.output, self.pooling = output, pooling
        self.pad, self.eos, self.scale = pad, eos, scale
        self.hidden: Tensor = output.last_hidden_state
        self.pooler_output: Tensor | None = output.get("pooler_output")
        self.attention_mask, self.input_ids = attention_mask, input_ids
        self.choices, self.embeddings = choices, embeddings
        self.undo = undo or (lambda hidden: hidden)
        self.rescore = rescore or (lambda hidden, logits: logits)
        self._first = first
        self._pooled = first if pooling == "first_token" else None

    def pooled(self, use_pooler: bool = False) -> Tensor:
        """One vector per row: ``(batch, hidden)``.

        Args:
            use_pooler: Take the trained pooler's result instead of the token's hidden state.

        Raises:
            UnsupportedError: If the model has no pooler, or the tokens that tell where the
                sequence ends were not given.
        """
        if use_pooler:
            if self.pooler_output is None:
                raise UnsupportedError(
                    "This model has no trained pooler; add the head with use_pooler=False."
                )
            return self.pooler_output
        if self._pooled is None:
            self._pooled = pool(self)
        return self._pooled

    @property
    def scaled(self) -> Tensor:
        """The hidden states as language-model heads read them."""
        return self.hidden if self.scale == 1.0 else self.hidden * self.scale

    def select(
        self,
        take: Callable[[Tensor], Tensor],
        undo: Callable[[Tensor], Tensor] | None,
        rescore: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Features:
        """The features of some rows only.

        Args:
            take: Picks those rows of a tensor.
            undo: The inverse of the invertible adapters of those rows.
            rescore: The correction of scores for the adapters of those rows.
        """
        rows = self.hidden.shape[0]

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
                return take(value)
            return tuple(map(cut, value)) if isinstance(value, tuple) else value

        output = type(self.output)(**{key: cut(value) for key, value in self.output.items()})
        return Features(
            output,
            pooling=self.pooling,
            pad=self.pad,
            eos=self.eos,
            scale=self.scale,
            attention_mask=cut(self.attention_mask),
            input_ids=cut(self.input_ids),
            choices=self.choices,
            embeddings=self.embeddings,
            undo=undo,
            rescore=rescore,
            first=cut(self._first),
        )


class PredictionHead(nn.Module):
    """A named prediction head over `Features`.

    A head type is a subclass with a configuration class. Its ``state_dict()`` is its checkpoint.

    Args:
        name: The head's name.
        config: An instance of `config_class`.
        model_config: The configuration of the model it stands on.
    """

    head_type: ClassVar[str]
    config_class: ClassVar[type[HeadConfig]]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    """The keyword arguments of the model's forward that are this type's labels."""
    writes_labels: ClassVar[bool] = False
    """Whether its ``labels`` are what a decoder shall write, so that they also are its input."""

    def __init__(self, name: str, config: Any, model_config: PretrainedConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.hidden_size = int(model_config.hidden_size)
        self.initializer_range = float(getattr(model_config, "initializer_range", 0.02))
        self.dropout_prob = _dropout(config, model_config)

    @abstractmethod
    def forward(self, features: Features, **labels: Any) -> ModelOutput:
        """Predicts, and computes the loss where labels are given.

        Args:
            features: What the backbone computed.
            labels: The arguments that `label_names` names, as far as they were given.

        Returns:
            The transformers output class of this type.
        """

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written into files, with its ``head_type``."""
        return {"head_type": self.head_type, **self.config.to_dict()}

    def initialise(self) -> None:
        """Draws new weights as the model draws its own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.head_type}"


class Stacked(nn.Module):
    """Linear layers with dropout before each and an activation between them.

    Args:
        sizes: Sizes from the input to the output; one layer between each two.
        activation: The activation, or None.
        dropout: Dropout probability.
        bias: Whether the last layer has a bias.
    """

    def __init__(
        self, sizes: Sequence[int], activation: nn.Module | None, dropout: float, bias: bool = True
    ) -> None:
        super().__init__()
        last = len(sizes) - 2
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            self.add_module(str(number), nn.Linear(inputs, outputs, bias=bias or number < last))
        self.depth = len(sizes) - 1
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(..., sizes[0])`` to ``(..., sizes[-1])``."""
        for number in range(self.depth):
            hidden = self.get_submodule(str(number))(self.dropout(hidden))
            if self.activation is not None and number < self.depth - 1:
                hidden = self.activation(hidden)
        return hidden


def check_names(label2id: Mapping[str, int] | None, count: int) -> None:
    """Refuses label names that do not name each of `count` numbers once.

    Raises:
        ConfigError: If they do not.
    """
    if label2id is not None and sorted(label2id.values()) != list(range(count)):
        raise ConfigError(
            f"There are {count} labels or choices, but their names are numbered "
            f"{sorted(label2id.values())}: name every number below {count} once."
        )


def label_names(num_labels: int | None, id2label: Mapping[Any, str] | None) -> dict[str, Any]:
    """The configuration fields ``num_labels`` and ``label2id`` from what users give.

    Args:
        num_labels: Number of labels; None takes it from the names, or else 2.
        id2label: Name of each label by number.

    Raises:
        LabelError: If two labels share a name, numbers are left out, the two arguments contradict
            each other, or they are no number and no mapping.
    """
    try:
        count = None if num_labels is None else operator.index(num_labels)
        by_number = None if id2label is None else {int(n): id2label[n] for n in id2label}
    except (TypeError, ValueError, IndexError) as error:
        raise LabelError(
            f"num_labels={num_labels!r} should be a number, and id2label={id2label!r} a mapping of "
            "numbers to names."
        ) from error
    if by_number is None:
        count = 2 if count is None else count
        return {"num_labels": count, "label2id": {f"LABEL_{i}": i for i in range(count)}}
    names = list(by_number.values())
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise LabelError(
            f"id2label gives the names {repeated} to several labels; make them unique."
        )
    if count is not None and count != len(names):
        raise LabelError(
            f"num_labels={count}, but id2label names {len(names)} labels; leave one out."
        )
    numbers = {name: number for number, name in by_number.items()}
    if sorted(numbers.values()) != list(range(len(names))):
        raise LabelError(
            f"id2label numbers the labels {sorted(numbers.values())}; name every number below "
            f"{len(names)} once."
        )
    return {"num_labels": len(names), "label2id": numbers}


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the last dimension; labels of -100 do not count."""
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def _dropout(config: HeadConfig, model_config: PretrainedConfig) -> float:
    names = ("classifier_dropout", "hidden_dropout_prob")
    values = [config.dropout_prob, *(getattr(model_config, name, None) for name in names), 0.0]
    return float(next(value for value in values if value is not None))


__all__ = [
    "Features",
    "HeadConfig",
    "LabelledConfig",
    "PredictionHead",
    "Stacked",
    "check_names",
    "classification_loss",
    "label_names",
]
