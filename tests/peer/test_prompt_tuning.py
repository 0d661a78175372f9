"""Prompt tuning gives the peer's outputs and gradients, and reads and writes its files.

The peer's outputs keep the positions of the prompt, which ours are without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads.testing import randomise

from .comparing import assert_close, call, weighted
from .exchange import peer_load
from .library import PeerConfig, adapters
from .pairs import (
    NAME,
    SEED,
    adapted,
    add_our_adapter,
    add_peer_adapter,
    inputs,
    our_model,
    peer_model,
)

pytestmark = pytest.mark.peer

LENGTH = 4
each_place = pytest.mark.parametrize("combine", ["prefix", "prefix_after_bos"])


def config(combine: str) -> dict[str, Any]:
    fields: dict[str, Any] = PeerConfig.load(
        "prompt_tuning", prompt_length=LENGTH, combine=combine
    ).to_dict()
    return fields


def cut(output: Any, combine: str) -> dict[str, Tensor]:
    first, hidden = int(combine != "prefix"), output.last_hidden_state
    if hidden.shape[1] > inputs()["input_ids"].shape[1]:
        hidden = torch.cat([hidden[:, :first], hidden[:, first + LENGTH :]], dim=1)
    return {"last_hidden_state": hidden, "pooler_output": output.pooler_output}


def assert_same(ours: Any, theirs: Any, combine: str) -> None:
    one, other = cut(call(ours), combine), cut(call(theirs), combine)
    for key in one:
        assert_close(one[key], other[key], key)


@each_place
def test_outputs_and_gradients_are_the_peers(combine: str) -> None:
    ours, theirs = adapted(config(combine))
    assert_same(ours, theirs, combine)
    found = []
    for model in (ours, theirs):
        model.train().requires_grad_(True)
        weighted(cut(model(**inputs()), combine)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    (own,) = (g for n, g in found[0].items() if "prompt" in n)
    (other,) = (g for n, g in found[1].items() if "prompt" in n)
    assert own.abs().max() > 0
    assert_close(own, other, "prompt")
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert_close(found[0][embeddings], found[1][embeddings], embeddings)


@each_place
@pytest.mark.parametrize("safe", [True, False])
def test_we_read_what_the_peer_writes(combine: str, safe: bool, tmp_path: Path) -> None:
    theirs, ours = peer_model(), our_model()
    add_peer_adapter(theirs, config(combine))
    theirs.save_adapter(str(tmp_path), NAME, use_safetensors=safe)
    for load_as in (None, "another"):
        ours.load_adapter(tmp_path, load_as=load_as, set_active=True)
        assert_same(ours, theirs, combine)


@each_place
def test_the_peer_reads_what_we_write(combine: str, tmp_path: Path) -> None:
    ours, theirs = our_model(), peer_model()
    add_our_adapter(ours, config(combine))
    randomise(ours.adapters[NAME], seed=SEED)
    ours.save_adapter(tmp_path, NAME)
    peer_load(theirs, tmp_path)
    assert_same(ours, theirs, combine)


def test_prompts_do_not_attend_to_padding_whatever_the_attention_function() -> None:
    """The peer's do under sdpa, where its outputs depend on what stands in the padding."""
    outputs: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for padding in (5, 6):
        given = inputs()
        given["input_ids"][given["attention_mask"] == 0] = padding
        for name, kind in {"ours": our_model, "theirs": peer_model}.items():
            model = kind()
            model.config._attn_implementation = "sdpa"
            rebuilt = type(model)(model.config)
            if name == "theirs":
                adapters.init(rebuilt)
            rebuilt.base_model.load_state_dict(model.base_model.state_dict())
            add = add_our_adapter if name == "ours" else add_peer_adapter
            add(rebuilt.eval(), config("prefix"))
            outputs[name].append(call(rebuilt, given).pooler_output)
    assert_close(outputs["ours"][0], outputs["ours"][1])
    assert not torch.allclose(outputs["theirs"][0], outputs["theirs"][1], atol=1e-4)
