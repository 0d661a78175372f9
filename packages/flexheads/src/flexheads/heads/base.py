"""What every head has in common: its configuration, how it reads features, its place in files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from flexheads.errors import UnsupportedError
from flexheads.heads.config import FeedForwardConfig, HeadConfig, PooledConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape
from flexheads.heads.layers import AttentionPooling, LayerMix, Stacked
from flexheads.heads.losses import ONE_OF_MANY, Loss, loss_function
from flexheads.heads.pooling import WIDTHS, real_positions
from flexheads.heads.source import Source


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
        if config.hidden_layer == "mix":
            self.mix = LayerMix(_depth(model_config) + 1)
        self.loss: Loss = loss_function(config.loss, self.losses, self.num_outputs)

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that make sense for it, by name; the first is its own."""
        return ONE_OF_MANY

    @property
    def num_outputs(self) -> int:
        """How many scores it gives, of each sequence or each token."""
        return 1

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
        """The features as this head reads them: those of its hidden layer."""
        layer = self.config.hidden_layer
        return features.at(self.mix if layer == "mix" else layer)

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
        width = self.hidden_size * self.width
        sizes = [width] + [self.hidden_size] * (config.layers - 1) + [self.num_outputs]
        self.layers = Stacked(sizes, config, self.dropout_prob, norm_eps(model_config))
        self.initialise()

    @property
    def width(self) -> int:
        """The size of what it reads, in hidden sizes."""
        return 1

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels)

    def read(self, features: Features) -> Tensor:
        """What the first layer gets: every token, ``(batch, sequence, hidden)``."""
        return features.hidden

    def forward(self, features: Features, **labels: Any) -> Any:
        return self.finish(self.layers(self.read(features)), features, **labels)

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


def norm_eps(model_config: PretrainedConfig) -> float:
    """The epsilon of the model's own layer norms."""
    names = ("layer_norm_eps", "norm_eps")
    return next((float(getattr(model_config, n)) for n in names if hasattr(model_config, n)), 1e-12)


def _dropout(config: HeadConfig, model_config: PretrainedConfig) -> float:
    names = ("classifier_dropout", "hidden_dropout_prob")
    values = [config.dropout_prob, *(getattr(model_config, name, None) for name in names), 0.0]
    return float(next(value for value in values if value is not None))


def _depth(model_config: PretrainedConfig) -> int:
    """Layers behind the hidden states that heads read; the decoder's where there is one."""
    two_sides = getattr(model_config, "is_encoder_decoder", False)
    names = ["decoder_layers", "num_decoder_layers"] if two_sides else []
    names.append("num_hidden_layers")
    return int(next(getattr(model_config, name) for name in names if hasattr(model_config, name)))
