"""X-vectors: one vector for a voice, trained to tell speakers apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import XVectorOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import PredictionHead
from flexheads.heads.config import NamedLabelsConfig
from flexheads.heads.features import Features
from flexheads.heads.frames import frame_lengths
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class XVectorConfig(NamedLabelsConfig):
    """Configuration of `XVectorHead`; the sizes are those of SUPERB.

    Attributes:
        num_labels: Number of speakers to train on.
        sizes: Sizes of the convolutions over frames; the first is that of the projection too.
        kernels: How many frames each convolution reads.
        dilations: How far apart these are.
        embedding_size: Size of the vectors.
        scale: What cosines are multiplied by in the loss.
        margin: How much smaller the right cosine is made in the loss.
    """

    sizes: Sequence[int] = (512, 512, 512, 512, 1500)
    kernels: Sequence[int] = (5, 3, 3, 1, 1)
    dilations: Sequence[int] = (1, 2, 3, 1, 1)
    embedding_size: int = 512
    scale: float = 30.0
    margin: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.sizes) == len(self.kernels) == len(self.dilations) > 0:
            raise ConfigError(
                f"sizes={self.sizes!r}, kernels={self.kernels!r} and dilations={self.dilations!r} "
                "should have one value for each convolution."
            )


class _Convolution(nn.Module):
    """One time-delay layer: a dilated convolution over frames, and ReLU."""

    def __init__(self, inputs: int, size: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.inputs, self.width, self.dilation = inputs, kernel, dilation
        self.kernel = nn.Linear(inputs * kernel, size)  # frame by frame, as checkpoints have it

    def forward(self, hidden: Tensor) -> Tensor:
        """``(batch, frames, inputs)`` to ``(batch, fewer frames, size)``."""
        weight = self.kernel.weight.view(-1, self.width, self.inputs).transpose(1, 2)
        hidden = functional.conv1d(
            hidden.transpose(1, 2), weight, self.kernel.bias, dilation=self.dilation
        )
        return hidden.transpose(1, 2).relu()


class XVectorHead(PredictionHead):
    """Vectors of voices (x-vectors, Snyder et al. 2018), by an additive margin (arXiv:1801.05599).

    The output's ``embeddings`` are the vectors, ``(batch, embedding_size)``; ``logits``, of the
    same size, is what the loss compares with one direction for each speaker.
    """

    head_type = "xvector"
    needs = "sound"
    config_class = XVectorConfig

    def __init__(self, name: str, config: XVectorConfig, model_config: PretrainedConfig) -> None:
        super().__init__(name, config, model_config)
        sizes, size = list(config.sizes), config.embedding_size
        self.projector = nn.Linear(self.hidden_size, sizes[0])
        layers = zip([sizes[0], *sizes], sizes, config.kernels, config.dilations, strict=False)
        self.tdnn = nn.ModuleList(_Convolution(*layer) for layer in layers)
        self.embedding = nn.Linear(2 * sizes[-1], size)
        self.output = nn.Linear(size, size)
        self.speakers = nn.Parameter(torch.randn(size, config.num_labels))
        self.initialise()

    @classmethod
    def labels_in(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int | None:
        """See `PredictionHead.labels_in`; there is one direction for each speaker."""
        speakers = tensors.get("speakers")
        return None if speakers is None else int(speakers.shape[1])

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is not None:
            shapes = [(shape.rows,), (shape.rows, 1)]
            check_indices(f"labels of head {self.name!r}", given, self.num_outputs, shapes)

    def forward(self, features: Features, **labels: Any) -> Any:
        """See `PredictionHead.forward`; ``labels`` is ``(batch,)``, the number of the speaker.

        Raises:
            ConfigError: If a row has fewer than two frames behind the convolutions.
        """
        lengths, hidden = self._lengths(features), self.projector(features.hidden)
        for layer in self.tdnn:
            hidden = layer(hidden)
        vectors = self.embedding(_statistics(hidden, lengths))
        logits, given = self.output(vectors), labels.get("labels")
        return head_output(
            XVectorOutput,
            features.output,
            loss=None if given is None else self._margin_loss(logits, given.reshape(-1)),
            logits=logits,
            embeddings=vectors,
        )

    def decode(
        self, output: Any, source: Source | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """The vector of each sound, and the speaker of those trained on who is nearest.

        Returns:
            For each row ``{"embedding", "label", "score"}``: the numbers of the vector, which are
            compared by their cosine; the nearest speaker; and the cosine to that one's direction.
        """
        cosines, nearest = self._cosines(output.logits).max(dim=-1)
        found = zip(output.embeddings, nearest.tolist(), cosines.tolist(), strict=True)
        names = self.config.id2label
        return [
            {"embedding": vector.float().tolist(), "label": names[number], "score": cosine}
            for vector, number, cosine in found
        ]

    def _lengths(self, features: Features) -> Tensor:
        """Real frames behind the convolutions; as in SUPERB, dilations are not counted.

        Raises:
            ConfigError: If there are fewer than two.
        """
        kernels = [int(kernel) - 1 for kernel in self.config.kernels]
        reach = sum(k * d for k, d in zip(kernels, self.config.dilations, strict=True))
        real: Tensor = frame_lengths(features) - sum(kernels)
        all_of_them = features.hidden.shape[1] - reach
        if not torch.compiler.is_compiling() and min(all_of_them, int(real.min())) < 2:
            raise ConfigError(
                f"Head {self.name!r} needs at least {reach + 2} frames of every sound: give longer "
                "sounds, or smaller kernels."
            )
        return real

    def _margin_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of scaled cosines, the right one less the margin (equations 6 and 7)."""
        cosines = self._cosines(logits)
        right = functional.one_hot(labels.clamp(min=0), self.num_outputs)
        return self.loss(self.config.scale * (cosines - self.config.margin * right), labels)

    def _cosines(self, logits: Tensor) -> Tensor:
        """The cosine of each row to the direction of each speaker, ``(batch, num_labels)``."""
        directions = functional.normalize(self.speakers, dim=0)
        return functional.normalize(logits, dim=1) @ directions


def _statistics(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Mean and standard deviation over the first frames of each row.

    Args:
        hidden: ``(batch, frames, size)``.
        lengths: ``(batch,)``, at least two.

    Returns:
        ``(batch, 2 * size)``.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    real = (positions < lengths.unsqueeze(1)).unsqueeze(-1).to(hidden.dtype)
    count = real.sum(dim=1)
    mean = (hidden * real).sum(dim=1) / count
    squares = ((hidden - mean.unsqueeze(1)) ** 2 * real).sum(dim=1)
    # Above zero, or frames that are all alike would have no gradient that is a number.
    variance: Tensor = (squares / (count - 1)).clamp(min=torch.finfo(hidden.dtype).tiny)
    return torch.cat([mean, variance.sqrt()], dim=-1)
