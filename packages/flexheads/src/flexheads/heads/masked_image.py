"""Masked image modelling: the pixels of an image from those of its patches that are visible."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import MaskedImageModelingOutput

from flexheads.errors import ConfigError, LabelError
from flexheads.heads.base import PredictionHead
from flexheads.heads.config import HeadConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_numbers, check_shape
from flexheads.heads.losses import NUMBERS
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MaskedImageConfig(HeadConfig):
    """Configuration of `MaskedImageHead`.

    Attributes:
        stride: Pixels, each way, that a position stands for; None takes the model's
            ``encoder_stride``, or else its ``patch_size``.
        num_channels: Colours; None takes the model's.
    """

    stride: int | None = None
    num_channels: int | None = None

    def completed(self, model_config: PretrainedConfig) -> MaskedImageConfig:
        """The configuration with what it leaves to the model filled in.

        Raises:
            ConfigError: If the model reads no images.
        """
        names = ("encoder_stride", "patch_size")
        found = (getattr(model_config, name, None) for name in names)
        stride = self.stride or next((value for value in found if value is not None), None)
        channels = self.num_channels or getattr(model_config, "num_channels", None)
        if stride is None or channels is None:
            raise ConfigError("This model reads no images; give stride and num_channels.")
        return self.replace(stride=stride, num_channels=channels)


class MaskedImageHead(PredictionHead):
    """Draws the image: ``reconstruction`` is ``(batch, channels, height, width)``.

    One linear layer gives the pixels of each position (SimMIM, arXiv:2111.09886, section 3.3).
    Positions in front of the square of patches, such as a first token, are not read.
    """

    head_type = "masked_image_modeling"
    needs = "pixels"
    config_class = MaskedImageConfig
    label_names = ("labels", "masked_patches")

    def __init__(
        self, name: str, config: MaskedImageConfig, model_config: PretrainedConfig
    ) -> None:
        config = config.completed(model_config)
        super().__init__(name, config, model_config)
        self.decoder = nn.Conv2d(self.hidden_size, self.num_outputs, kernel_size=1)
        nn.init.normal_(self.decoder.weight, std=self.initializer_range)
        nn.init.zeros_(self.decoder.bias)  # type: ignore[arg-type]

    @property
    def losses(self) -> tuple[str, ...]:
        return ("l1", *(name for name in NUMBERS if name != "l1"))

    @property
    def num_outputs(self) -> int:
        return int(self.config.stride**2 * self.config.num_channels)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        where = f"of head {self.name!r}"
        if (given := labels.get("labels")) is not None:
            channels = self.config.num_channels
            check_numbers(f"labels {where}", given, [(shape.rows, channels, None, None)])
        if (masked := labels.get("masked_patches")) is not None:
            check_shape(f"masked_patches {where}", masked, [(shape.rows, None)])
            if not torch.compiler.is_compiling() and not bool(masked.any()):
                raise LabelError(f"masked_patches {where} mark no patch, so there is no loss.")

    def forward(self, features: Features, **labels: Any) -> Any:
        """See `PredictionHead.forward`.

        ``labels`` are the pixels, ``(batch, channels, height, width)``; ``masked_patches``,
        ``(batch, patches)``, says which patches count; without it all do.

        Raises:
            LabelError: If the labels have another size than what the head draws.
        """
        side = math.isqrt(features.hidden.shape[1])
        patches = features.hidden[:, -side * side :].transpose(1, 2)
        patches = patches.reshape(*patches.shape[:2], side, side)
        drawn = functional.pixel_shuffle(self.decoder(patches), self.config.stride)
        given, loss = labels.get("labels"), None
        if given is not None:
            loss = self._pixel_loss(drawn, given, labels.get("masked_patches"))
        return head_output(
            MaskedImageModelingOutput, features.output, loss=loss, reconstruction=drawn
        )

    def decode(self, output: Any, source: Source | None = None, **options: Any) -> list[Any]:
        """What is drawn for each row: its pixels as lists, ``[channel][row][column]``.

        They are in the units of the model's inputs, which image processors make of colours.
        """
        drawn: list[Any] = output.reconstruction.float().tolist()
        return drawn

    def _pixel_loss(self, drawn: Tensor, pixels: Tensor, masked: Tensor | None) -> Tensor:
        if drawn.shape != pixels.shape:
            raise LabelError(
                f"labels of head {self.name!r} are images of {tuple(pixels.shape)}, and it draws "
                f"{tuple(drawn.shape)}; the head's stride is {self.config.stride}."
            )
        if masked is None:
            return self.loss(drawn, pixels)
        side = math.isqrt(masked.shape[1])
        square = masked.bool().reshape(-1, 1, side, side).to(drawn.dtype)
        where = functional.interpolate(square, size=drawn.shape[-2:], mode="nearest")
        chosen = where.bool().expand_as(drawn)
        return self.loss(drawn[chosen], pixels[chosen])
