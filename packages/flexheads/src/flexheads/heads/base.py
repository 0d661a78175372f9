"""What every head has in common: its configuration, how it reads features, its place in files."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.heads.config import (
    FeedForwardConfig,
    HeadConfig,
    LabelledConfig,
    PooledConfig,
    by_number,
)
from flexheads.heads.features import Features
from flexheads.heads.inputs import Samples, Texts
from flexheads.heads.labels import InputShape
from flexheads.heads.layers import AttentionPooling, LayerMix, Stacked
from flexheads.heads.losses import ONE_OF_MANY, Loss, loss_function
from flexheads.heads.pooling import WIDTHS, real_positions
from flexheads.heads.source import Source
from flexheads.specs import ArchitectureSpec, Need

_WITHOUT: dict[Need, str] = {
    "tokens": "neither reads nor writes tokens",
    "pixels": "reads no images",
    "sound": "reads no sound",
    "decoder": "has no decoder beside an encoder",
}
"""What a model does that lacks what a type of head needs."""


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
    needs: ClassVar[Need | None] = None
    """What a model must read, or have, for heads of this type; None is any sequence of states."""
    writes_labels: ClassVar[bool] = False
    """Whether its ``labels`` are what a decoder shall write, so that they also are its input."""
    samples: ClassVar[Samples] = Texts()
    """What `predict` takes, on a model that reads text."""
    _owner: weakref.ref[Any] | None = None

    def __init__(self, name: str, config: Any, model_config: PretrainedConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.hidden_size = int(model_config.hidden_size)
        self.initializer_range = float(getattr(model_config, "initializer_range", 0.02))
        self.dropout_prob = _dropout(config, model_config)
        if config.side and not getattr(model_config, "is_encoder_decoder", False):
            raise UnsupportedError('This model has one side; add the head without side="encoder".')
        if config.hidden_layer is not None:
            states = _depth(model_config, config.side) + 1
            check_layer(config.hidden_layer, states)
        if config.hidden_layer == "mix":
            self.mix = LayerMix(states)
        self.loss: Loss = loss_function(config.loss, self.losses, self.num_outputs)

    @classmethod
    def check_architecture(cls, spec: ArchitectureSpec) -> None:
        """Refuses an architecture that lacks what heads of this type need.

        Raises:
            UnsupportedError: If so; the message says what it lacks.
        """
        if spec.pooling is None:
            raise UnsupportedError(
                f"{spec.with_heads} gives no sequence of states that a head could read. Add heads "
                "to a model of one of its parts."
            )
        if cls.needs is not None and cls.needs not in spec.gives:
            raise UnsupportedError(
                f"Heads of type {cls.head_type!r} are not for a {spec.with_heads}, which "
                f"{_WITHOUT[cls.needs]}."
            )

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that make sense for it, by name; the first is its own."""
        return ONE_OF_MANY

    @property
    def num_outputs(self) -> int:
        """How many scores it gives, of each sequence or each token."""
        return 1

    @property
    def id2label(self) -> dict[int, str] | None:
        """The name of each label, or choice, by its number; None where it has none."""
        names: Mapping[str, int] | None = self.config.get("label2id")
        if names is None:
            found: dict[int, str] | None = getattr(self.config, "id2label", None)
            return found
        return by_number(names)

    @abstractmethod
    def forward(self, features: Features, **labels: Any) -> ModelOutput:
        """Predicts, and computes the loss where labels are given.

        Args:
            features: What the backbone computed.
            labels: The arguments that `label_names` names, as far as they were given.

        Returns:
            The transformers output class of this type.
        """

    def view(self, features: Features) -> Features:
        """The features as this head reads them: those of its side and its hidden layer."""
        layer = self.config.hidden_layer
        if self.config.side == "encoder":
            features = features.encoder
        return features.at(self.mix if layer == "mix" else layer)

    @classmethod
    def labels_in(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int | None:
        """The number of labels, read off saved tensors; None where there is none to read.

        Args:
            config: Its saved configuration.
            tensors: Its saved tensors.
        """
        return None

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        """Refuses labels that cannot be, before the backbone runs.

        Args:
            labels: The arguments that `label_names` names, as far as they were given.
            shape: The shape of the inputs that they belong to.

        Raises:
            LabelError: If their dtype, shape or values are wrong; see `flexheads.heads.labels`.
        """

    def decode(self, output: Any, source: Source | None = None, **options: Any) -> list[Any]:
        """What the scores mean to a person: plain values, one for each row.

        Args:
            output: What `forward` returned.
            source: The inputs as people know them.
            options: The type's own options.

        Raises:
            UnsupportedError: If the type has nothing to say, or needs what `source` lacks.
        """
        raise UnsupportedError(f"Heads of type {self.head_type!r} do not decode.")

    def predict(self, tokenizer: Any, samples: Any, **arguments: Any) -> Any:
        """What this head says of samples: `predict` of the model that it is in.

        Args:
            tokenizer: The tokenizer; None loads what was saved with the model.
            samples: The samples.
            arguments: The further arguments of the model's method.

        Raises:
            ConfigError: If it is in no model.
        """
        model = None if self._owner is None else self._owner()
        if model is None or self.name not in model.heads or model.heads[self.name] is not self:
            raise ConfigError(
                f"Head {self.name!r} is in no model, so it cannot predict. Copy, pickle or save "
                "the model that it belongs to, or call that model's predict."
            )
        return model.predict(self.name, samples, tokenizer, **arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a head alone leave its model behind."""
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

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


class FeedForwardHead(PredictionHead):
    """A head of linear layers: `read` the features, `layers` over them, `finish` with the scores.

    A type needs `num_outputs` and `finish`, and `read` where it reads other than every token.
    Heads of one shape can then run as one product.
    """

    config_class: ClassVar[type[FeedForwardConfig]]

    def __init__(self, name: str, config: Any, model_config: PretrainedConfig) -> None:
        super().__init__(name, config, model_config)
        self.layers = Stacked(self.sizes, config, self.dropout_prob, norm_eps(model_config))
        self.initialise()

    @classmethod
    def labels_in(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int | None:
        """See `PredictionHead.labels_in`; they are the outputs of the last layer."""
        last = tensors.get(f"layers.{config['layers'] - 1}.weight")
        named = issubclass(cls.config_class, LabelledConfig) and last is not None
        return int(last.shape[0]) if named and last is not None else None

    @property
    def width(self) -> int:
        """The size of what it reads, in hidden sizes."""
        return 1

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels)

    @property
    def sizes(self) -> list[int]:
        """From the size of what it reads to that of its scores, a layer between each two."""
        between = [self.hidden_size] * (self.config.layers - 1)
        return [self.hidden_size * self.width, *between, self.num_outputs]

    def read(self, features: Features) -> Tensor:
        """What the first layer gets: every token, ``(batch, sequence, hidden)``."""
        return features.hidden

    def forward(self, features: Features, **labels: Any) -> Any:
        return self.finish(self.layers(self.read(features)), features, **labels)

    @property
    def packs(self) -> bool:
        """Whether `finish`, without labels, only puts the scores into an output as its ``logits``.

        Where many heads run together, outputs of such heads are made by copying one of them.
        """
        return False

    @abstractmethod
    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """The output of scores, and the loss where labels are given; see `forward`.

        Args:
            scores: What the last layer gives.
            features: What the backbone computed.
            labels: The labels.
        """


class PooledHead(FeedForwardHead):
    """A head of linear layers over one vector for the sequence."""

    config_class: ClassVar[type[PooledConfig]]

    def __init__(self, name: str, config: Any, model_config: PretrainedConfig) -> None:
        super().__init__(name, config, model_config)
        if config.pooled_by == "attention":
            self.pool = AttentionPooling(self.hidden_size)

    @property
    def width(self) -> int:
        return WIDTHS.get(self.config.pooled_by, 1)

    def read(self, features: Features) -> Tensor:
        """What the first layer gets: the pooled vector, ``(batch, hidden)``."""
        if self.config.pooled_by == "attention":
            pooled: Tensor = self.pool(features.hidden, real_positions(features))
            return pooled
        return features.pooled(self.config.pooled_by)


def check_layer(layer: int | str, states: int) -> None:
    """Refuses a hidden layer that a model does not have.

    Args:
        layer: Number of the hidden states, or ``"mix"``.
        states: How many there are, those of the embeddings among them.

    Raises:
        ConfigError: If there is none of that number.
    """
    if isinstance(layer, int) and not -states <= layer < states:
        raise ConfigError(
            f"hidden_layer={layer}, but this model has {states} hidden states: 0 are the "
            f"embeddings, and {states - 1} or -1 is the last layer."
        )


def norm_eps(model_config: PretrainedConfig) -> float:
    """The epsilon of the model's own layer norms."""
    names = ("layer_norm_eps", "norm_eps")
    return next((float(getattr(model_config, n)) for n in names if hasattr(model_config, n)), 1e-12)


def _dropout(config: HeadConfig, model_config: PretrainedConfig) -> float:
    names = ("classifier_dropout", "hidden_dropout_prob")
    values = [config.dropout_prob, *(getattr(model_config, name, None) for name in names), 0.0]
    return float(next(value for value in values if value is not None))


def _depth(model_config: PretrainedConfig, side: str | None) -> int:
    """Layers behind the hidden states that heads read; the decoder's unless a side is named."""
    two_sides = getattr(model_config, "is_encoder_decoder", False)
    names = ["decoder_layers", "num_decoder_layers"] if two_sides and side is None else []
    names += ["encoder_layers", "num_hidden_layers"]
    return int(next(getattr(model_config, name) for name in names if hasattr(model_config, name)))
