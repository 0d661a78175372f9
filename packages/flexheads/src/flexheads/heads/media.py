"""Images and sounds as samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexheads.errors import ConfigError
from flexheads.heads.inputs import Limits, Piece, Samples
from flexheads.heads.source import Source


class Images(Samples):
    """An image, in any form that the image processor takes."""

    looks = "an image: a PIL image, an array, or a tensor"

    def pieces(self, processor: Any, samples: Sequence[Any], limits: Limits) -> list[Piece]:
        return [Piece(number, sample) for number, sample in enumerate(samples)]

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        made = processor(images=[piece.content for piece in pieces], return_tensors="pt")
        return dict(made), Source(tokenizer=getattr(processor, "tokenizer", None))


class Sounds(Samples):
    """Sound, one channel, at the sampling rate of the feature extractor."""

    looks = 'a sound: one row of samples, or {"array": ..., "sampling_rate": ...}'

    def pieces(self, processor: Any, samples: Sequence[Any], limits: Limits) -> list[Piece]:
        return [self._piece(processor, number, sample) for number, sample in enumerate(samples)]

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        extractor = getattr(processor, "feature_extractor", processor)
        sounds = [piece.content.numpy() for piece in pieces]
        # Only what reads waves of any length is padded to the longest; else the extractor knows.
        how = {"padding": True} if extractor.model_input_names[0] == "input_values" else {}
        made = extractor(sounds, sampling_rate=_rate(extractor), return_tensors="pt", **how)
        tokenizer = getattr(processor, "tokenizer", None)
        return dict(made), Source(attention_mask=made.get("attention_mask"), tokenizer=tokenizer)

    def _piece(self, processor: Any, number: int, sample: Any) -> Piece:
        rate = _rate(getattr(processor, "feature_extractor", processor))
        given = sample.get("sampling_rate", rate) if isinstance(sample, Mapping) else rate
        if given != rate:
            raise ConfigError(
                f"Sample {number} has a sampling rate of {given} Hz, and the model reads {rate} "
                "Hz; resample it."
            )
        try:
            array = sample["array"] if isinstance(sample, Mapping) else sample
            sound = torch.as_tensor(array, dtype=torch.float32).cpu()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"Sample {number} should be {self.looks}.") from error
        if sound.dim() != 1 or not len(sound):
            raise ConfigError(
                f"Sample {number} has shape {tuple(sound.shape)}, and should be {self.looks}."
            )
        return Piece(number, sound, len(sound))


def _rate(extractor: Any) -> int:
    return int(extractor.sampling_rate)
