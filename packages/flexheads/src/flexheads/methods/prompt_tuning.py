"""Prompt tuning: learned embeddings that stand before the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, awaits_values, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.sites.base import AttachedSite
from flexheads.sites.prompt import PROMPT, AttachedPrompt
from flexheads.sites.prompts import PromptPart


@dataclasses.dataclass(frozen=True, eq=False)
class PromptTuningConfig(AdapterConfig):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691).

    Attributes:
        prompt_length: Number of positions.
        prompt_init: ``"random_uniform"``, or ``"from_string"`` for the embeddings of a text, which
            is repeated or cut to the length.
        prompt_init_text: That text.
        combine: ``"prefix"`` puts the prompt before the sequence, ``"prefix_after_bos"`` behind its
            first position.
        init_weights_seed: Seed of the initialisation.
        random_uniform_scale: The largest value of a random initialisation.
    """

    architecture: ClassVar[str | None] = "prompt_tuning"

    prompt_length: int = 10
    prompt_init: Literal["random_uniform", "from_string"] = "random_uniform"
    prompt_init_text: str | None = None
    combine: Literal["prefix", "prefix_after_bos"] = "prefix"
    init_weights_seed: int | None = None
    random_uniform_scale: float = 0.5

    def __post_init__(self) -> None:
        length = self.prompt_length
        check = {
            "prompt_length": type(length) is int and length >= 1,
            "prompt_init": self.prompt_init in ("random_uniform", "from_string"),
            "combine": self.combine in ("prefix", "prefix_after_bos"),
        }
        if wrong := [name for name, right in check.items() if not right]:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise ConfigError(f"{type(self).__name__}: {values} is not a legal value.")
        if self.prompt_init == "from_string" and not self.prompt_init_text:
            raise ConfigError('prompt_init="from_string" needs a text in prompt_init_text.')


class Prompt(PromptPart):
    """The embeddings of a prompt.

    Args:
        width: Width of the model's embeddings.
        config: The adapter's configuration.
        text: The embeddings of the initial text, ``(length, width)``, or None.
    """

    def __init__(self, width: int, config: PromptTuningConfig, text: Tensor | None) -> None:
        super().__init__()
        self.length = config.prompt_length
        self.after_first = config.combine == "prefix_after_bos"
        self.prompt_embedding = nn.Embedding(self.length, width)
        scale = config.random_uniform_scale
        if text is None:
            nn.init.uniform_(self.prompt_embedding.weight, -scale, scale)
        else:
            with torch.no_grad():
                self.prompt_embedding.weight.copy_(text)

    def forward(self) -> Tensor:
        """The prompt, ``(length, width)``."""
        return self.prompt_embedding.weight


class PromptTuningMethod(AdapterMethod):
    """Puts a `Prompt` at the prompt site."""

    config: PromptTuningConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        site = sites.get(PROMPT)
        if not isinstance(site, AttachedPrompt):
            raise UnsupportedError(
                "This model has no embeddings that a prompt could join: its package names none, it "
                "joins several, or it looks positions up by their number."
            )
        if site.behind_embeddings and getattr(model_config, "is_decoder", False):
            raise UnsupportedError(
                "Prompt tuning of a model that reads in both directions does not work with "
                "is_decoder=True in its configuration."
            )
        text = self._text(site, model_config)
        with seeded(self.config.init_weights_seed):
            return {PROMPT: Prompt(site.width, self.config, text)}

    def _text(self, site: AttachedPrompt, model_config: PretrainedConfig) -> Tensor | None:
        """The embeddings of the initial text, ``(length, width)``."""
        config = self.config
        if config.prompt_init != "from_string" or awaits_values():
            return None
        ids = _ids(str(config.prompt_init_text), model_config)
        times = -(-config.prompt_length // len(ids))
        weight: Any = site.tokens.weight
        found: Tensor = weight[torch.tensor((ids * times)[: config.prompt_length])]
        if found.shape[1] != site.width:
            raise UnsupportedError('prompt_init="from_string" needs embeddings of the hidden size.')
        return found.detach().float()


def _ids(text: str, model_config: Any) -> list[int]:
    name = getattr(model_config, "tokenizer_name_or_path", None) or model_config.name_or_path
    try:
        if not name:
            raise OSError("the model's configuration has no name_or_path")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'prompt_init="from_string" needs the tokenizer of the model, but that of {name!r} '
            "cannot be loaded. Save a tokenizer beside the model, or set "
            f"config.tokenizer_name_or_path to where there is one: {error}"
        ) from error
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(f"The tokenizer finds no token in prompt_init_text={text!r}.")
    return ids
