"""Tiny random models of any registered architecture, and inputs for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.models.with_heads import ModelWithHeads, with_heads_class
from flexheads.plugins import registry, resolve
from flexheads.specs import ArchitectureSpec


def tiny_config(architecture: str, **changes: Any) -> PretrainedConfig:
    """The tiny configuration that an architecture's spec gives.

    Args:
        architecture: The architecture's name.
        changes: Fields to set differently.
    """
    spec = registry().architecture(architecture)
    fields = copy.deepcopy({**spec.tiny, **changes})  # some configurations take from what they get
    config: PretrainedConfig = resolve(spec.backbone).config_class(**fields)
    return config


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> ModelWithHeads:
    """A tiny random model with flexible heads, in eval mode."""
    torch.manual_seed(seed)
    config = tiny_config(architecture, **changes)
    model = with_heads_class(registry().architecture(architecture).with_heads)(config)
    return model.eval()


def tiny_static(class_name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of a transformers class, in eval mode, with every weight random.

    Biases and norms are drawn too, so that a check can tell whether one was lost.
    """
    torch.manual_seed(seed)
    conversion = registry().conversion(class_name)
    architecture = conversion.architecture
    if conversion.model_type is not None:
        architecture = registry().architecture_for(conversion.model_type).name
    model = getattr(transformers, class_name)(tiny_config(architecture, **changes)).eval()
    return randomise(model, std=0.1)


def tiny_inputs(
    config: PretrainedConfig, batch: int = 3, length: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of a model's kind.

    Args:
        config: The model's configuration.
        batch: Rows.
        length: Tokens in a row.
        seed: Of the random numbers.

    Returns:
        ``pixel_values``, ``input_features`` or ``input_values`` where the model reads these. Where
        it reads tokens ``input_ids`` and ``attention_mask``, with padding in the last row, with the
        tokens that the architecture is pooled at, and with as many ``decoder_input_ids`` where
        there is a decoder to feed.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = registry().architecture_for(config.model_type)
    if spec.inputs == "pixels":
        return {"pixel_values": _images(config, batch, generator)}
    if spec.inputs == "tokens_and_pixels":
        images = _images(config.vision_config, batch, generator)
        return {**tiny_inputs(config.text_config, batch, length, seed), "pixel_values": images}
    if spec.composed:
        read = tiny_inputs(config.encoder, batch, length, seed)
        config.decoder.decoder_start_token_id = config.decoder_start_token_id
        return {**read, **_to_decode(config.decoder, batch, length, generator)}
    if spec.inputs == "features":
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(shape, generator=generator)
        return {"input_features": features, **_to_decode(config, batch, length, generator)}
    if spec.inputs == "waveform":
        mask = torch.ones(batch, 400, dtype=torch.long)
        mask[-1, -150:] = 0
        return {
            "input_values": torch.randn(batch, 400, generator=generator),
            "attention_mask": mask,
        }
    return _tokens(spec, config, batch, length, generator)


def _tokens(
    spec: ArchitectureSpec, config: Any, batch: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    ends = spec.pooling == "pooler" and getattr(config, "eos_token_id", None) is not None
    if spec.pooling == "eos" or ends:
        ids[:, -1] = ids[-1, -3] = config.eos_token_id
    if getattr(config, "pad_token_id", None) is not None:
        ids[mask == 0] = config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "is_encoder_decoder", False):
        inputs |= _to_decode(config, batch, length, generator)
    return inputs


def _to_decode(
    config: Any, batch: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    read = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    read[:, 0] = config.decoder_start_token_id
    return {"decoder_input_ids": read}


def _images(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=generator)


def tiny_output(model: Any, **call: Any) -> Tensor:
    """What a model gives for its tiny inputs, without gradients.

    Args:
        model: The model.
        call: What the call is given beside the inputs, for example ``adapter_names``.

    Returns:
        The last hidden state ``(batch, length, size)``, or the first output of a model with a head.
    """
    with torch.no_grad():
        first: Tensor = model(**tiny_inputs(model.config), **call).to_tuple()[0]
    return first


@torch.no_grad()
def randomise(module: Any, std: float = 0.3, seed: int = 0) -> Any:
    """Draws every parameter anew, large enough to matter; layer norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parent = module.get_submodule(name.rpartition(".")[0])
        noise = torch.randn(parameter.shape, generator=generator) * std
        near_one = isinstance(parent, nn.LayerNorm) and name.endswith("weight")
        parameter.copy_((noise + 1.0 if near_one else noise).to(parameter))
    return module
