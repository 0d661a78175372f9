"""What building an adapter shows: its parameters, its places, whether it merges, how it starts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers import BertConfig

from flexheads.errors import UnsupportedError
from flexheads.models.with_heads import with_heads_class

_PLACES = {
    "residual": "residual stream at {}",
    "linear": "projections {}",
    "attention": "keys and values of {}",
    "hidden": "layer output",
    "embedding": "behind the embeddings",
    "norm": "layer norms",
    "tokens": "token embedding",
    "prompt": "before the tokens",
}
"""How the kinds of sites are called in tables; in braces stand the roles."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What tables say of one configuration.

    Attributes:
        parameters: Trainable parameters in a model of the size of BERT-base.
        share: The same in percent of that model.
        places: Where it acts.
        merges: Whether it can be folded into the backbone.
        neutral: Whether a new adapter leaves every output as it is.
    """

    parameters: int
    share: float
    places: str
    merges: bool
    neutral: bool

    @property
    def size(self) -> str:
        """Parameters and their share."""
        return f"{self.parameters:,} ({self.share:.2g} %)"


@functools.cache
def facts(config: str) -> Facts:
    """Builds an adapter of this configuration, and says what it is."""
    base = _base()
    base.add_adapter("new", config)
    adapter, sites = base.adapters["new"], base._attachment.sites
    roles: dict[str, dict[str, None]] = {}
    for address in adapter:
        site = sites[address]
        roles.setdefault(site.kind, {})[site.role.replace("_", " ")] = None
    places = (_PLACES[kind].format(", ".join(own)) for kind, own in roles.items())
    parameters = sum(p.numel() for p in adapter.parameters())
    base.delete_adapter("new")
    return Facts(parameters, _share(parameters), "; ".join(places), *_behaviour(config))


@functools.cache
def fusion_size(config: str) -> str:
    """The parameters of a fusion of two `seq_bn` in a model of the size of BERT-base."""
    base = _base()
    for name in ("a", "b"):
        base.add_adapter(name)
    base.add_adapter_fusion(["a", "b"], config)
    parameters = sum(p.numel() for p in base.adapter_fusions["a,b"].parameters())
    base.delete_adapter_fusion("a,b")
    for name in ("a", "b"):
        base.delete_adapter(name)
    return f"{parameters:,} ({_share(parameters):.2g} %)"


@functools.cache
def _base() -> Any:
    """A model of the size of BERT-base, whose weights are memory that nobody has written to."""
    with torch.device("meta"):
        model = with_heads_class("BertModelWithHeads")(BertConfig())
    return model.to_empty(device="cpu").eval()


def _share(parameters: int) -> float:
    return 100 * parameters / sum(p.numel() for p in _base().bert.parameters())


@functools.cache
def _small() -> Any:
    """A model that can run, wide enough for every default reduction factor."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=6,
        intermediate_size=384,
        vocab_size=99,
        attn_implementation="eager",
    )
    return with_heads_class("BertModelWithHeads")(config).eval()


@torch.no_grad()
def _behaviour(config: str) -> tuple[bool, bool]:
    """Whether it merges, and whether it changes nothing at the start."""
    model, ids = _small(), torch.arange(12).view(2, 6)
    before = model(ids).last_hidden_state
    model.add_adapter("new", config, set_active=True)
    try:
        neutral = torch.allclose(model(ids).last_hidden_state, before, atol=1e-6, rtol=0)
        model.merge_adapter("new")
    except UnsupportedError:
        return False, neutral
    finally:
        model.delete_adapter("new")
    return True, neutral
