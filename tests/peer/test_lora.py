"""Low-rank adaptation and its relatives: outputs, gradients, files, merging and averages."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from flexheads import load_config
from flexheads.testing import randomise

from .comparing import assert_same_gradients, assert_same_outputs, call, check_adapter
from .configurations import ident
from .exchange import peer_load
from .library import PeerConfig
from .pairs import NAME, SEED, adapted, adapter_keys, copy_adapter, our_model, peer_model

pytestmark = pytest.mark.peer

LORA: list[dict[str, Any]] = [
    *({"attn_matrices": list(m)} for n in (1, 2, 3) for m in itertools.combinations("qkv", n)),
    {"intermediate_lora": True},
    {"output_lora": True},
    {"selfattn_lora": False, "intermediate_lora": True, "output_lora": True},
    {"intermediate_lora": True, "output_lora": True, "leave_out": [0]},
    {"r": 1},
    {"r": 3, "alpha": 16},
    {"alpha": 1},
    {"use_gating": True},
    {"use_gating": True, "intermediate_lora": True, "output_lora": True, "alpha": 2},
    {"init_weights": "bert"},
    {"init_weights": "ia3", "r": 2},
]


@pytest.mark.parametrize("fields", LORA, ids=ident)
def test_lora(fields: dict[str, Any]) -> None:
    check_adapter("lora", **fields)


IA3: list[dict[str, Any]] = [
    {},
    {"alpha": 3},
    {"attn_matrices": ["q"], "intermediate_lora": False},
    {"output_lora": True},
    {"use_gating": True},
    {"leave_out": [1]},
]


@pytest.mark.parametrize("changes", IA3, ids=ident)
def test_ia3(changes: dict[str, Any]) -> None:
    check_adapter(PeerConfig.load("ia3", **changes).to_dict())


@pytest.mark.parametrize("fields", [{}, {"r": 2, "alpha": 7, "intermediate_lora": True}], ids=ident)
def test_a_merged_lora(fields: dict[str, Any]) -> None:
    ours, theirs = adapted("lora", **fields)
    for model in (ours, theirs):
        model.merge_adapter(NAME)  # which stays active, in the peer too, and acts only once
    assert_same_outputs(ours, theirs)


# --- relatives ---------------------------------------------------------------------------------

SAME: list[dict[str, Any]] = [
    # Scaled by one, and on a projection without a bias, the peer's DoRA is the definition.
    {"use_dora": True},
    {"use_dora": True, "use_gating": True},
    {"vera_d": 0.1, "vera_b": 0.0, "vera_dense": True, "r": 4},
    {"vera_d": 0.1, "vera_b": 0.0, "vera_dense": True, "use_gating": True},
    {"vera_d": 0.1, "vera_b": 0.0, "vera_dense": True, "use_dora": True},
    {"architecture": "mtl_lora"},
    {"architecture": "mtl_lora", "n_up_projection": 3, "alpha": 3, "weights_sharpness": 0.5},
    {"architecture": "mtl_lora", "n_up_projection": 2, "use_gating": True},
]
"""Fields of relatives of LoRA; the peer's VeRA learns square matrices."""


@pytest.mark.parametrize("fields", SAME, ids=ident)
def test_relatives(fields: dict[str, Any]) -> None:
    ours, theirs = related(fields)
    assert_same_outputs(ours, theirs)
    keys = adapter_keys(ours)
    if fields.get("n_up_projection", 1) == 1:  # one weight of a softmax has no gradient
        keys = {key: names for key, names in keys.items() if not key.endswith(".weights")}
    if fields.get("use_dora"):
        # The peer lets gradients through the norm; those of the magnitude are not concerned.
        keys = {key: names for key, names in keys.items() if key.endswith("m.weight")}
    assert_same_gradients(ours, theirs, {k: n for k, n in keys.items() if ".shared." not in k})


def related(fields: dict[str, Any]) -> tuple[Any, Any]:
    """Our model and the peer's, with random weights in adapter, in projections without biases."""
    identifier = "mtl_lora" if "architecture" in fields else "lora"
    given = {key: value for key, value in fields.items() if key != "architecture"}
    ours, theirs = our_model(), peer_model()
    for model in (ours, theirs):
        for layer in model.bert.encoder.layer:
            for word in ("query", "value"):
                getattr(layer.attention.self, word).bias.data.zero_()
    ours.add_adapter(NAME, load_config(identifier, **given), set_active=True)
    given.pop("vera_dense", None)
    theirs.add_adapter(NAME, config=PeerConfig.load(identifier, **given), set_active=True)
    randomise(ours.adapters[NAME], seed=SEED)
    copy_adapter(ours, theirs)
    return ours.double(), theirs.double()


@pytest.mark.parametrize(
    "config",
    [
        "lora[init_weights=pissa, alpha=3]",
        "lora[init_weights=olora, rank_stabilized=True, alpha=3, intermediate_lora=True]",
        "vera[r=4, alpha=3]",
        "vera[use_gating=True]",
        "dvora",
        "dora[init_weights=pissa]",
        "mtl_lora[n_up_projection=2]",
    ],
)
def test_the_peer_computes_the_same_from_our_files(config: str, tmp_path: Path) -> None:
    """In projections without biases, and magnitudes scaled by one; see above."""
    ours, theirs = our_model(), peer_model()
    for model in (ours, theirs):
        for layer in model.bert.encoder.layer:
            for word in ("query", "value"):
                getattr(layer.attention.self, word).bias.data.zero_()
    ours.add_adapter(NAME, config, set_active=True)
    randomise(ours.adapters[NAME], seed=SEED)
    ours.save_adapter(tmp_path, NAME)
    peer_load(theirs, tmp_path)
    bare = call(our_model())["last_hidden_state"]
    assert (call(ours)["last_hidden_state"] - bare).abs().max() > 1e-2
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("kind", ["vera", "dvora", "dora", "mtl_lora"])
def test_we_compute_the_same_from_new_files_of_the_peer(kind: str, tmp_path: Path) -> None:
    """A VeRA that has not been trained is diagonal, so that it becomes vectors."""
    ours, theirs = our_model(), peer_model()
    theirs.add_adapter(NAME, config=PeerConfig.load(kind), set_active=True)
    theirs.save_adapter(str(tmp_path), NAME)
    ours.load_adapter(tmp_path, set_active=True)
    assert not ours.adapters[NAME].config.vera_dense
    assert_same_outputs(ours, theirs)


def test_a_merged_vera() -> None:
    ours, theirs = related({"vera_d": 0.1, "vera_b": 0.0, "vera_dense": True, "alpha": 3})
    for model in (ours, theirs):
        model.merge_adapter(NAME)
    assert_same_outputs(ours, theirs)


# --- averages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("lora", {}),
        ("lora", {"weights": [1, 3]}),
        ("lora", {"weights": [2, 5], "normalize_weights": False}),
        (
            "lora",
            {
                "weights": [2, -1],
                "normalize_weights": False,
                "combine_strategy": "lora_linear_only_negate_b",
            },
        ),
        ("lora", {"weights": [1, 3], "combine_strategy": "lora_delta_w_svd", "svd_rank": 3}),
        ("ia3", {"weights": [1, 3]}),
        ("double_seq_bn", {"weights": [1, 3]}),
    ],
)
def test_average(kind: str, how: dict[str, Any]) -> None:
    ours, theirs = our_model(), peer_model()
    for seed, name in enumerate(("one", "two")):
        ours.add_adapter(name, kind)
        theirs.add_adapter(name, config=PeerConfig.load(kind))
        randomise(ours.adapters[name], seed=seed)
        copy_adapter(ours, theirs, name)
    ours, theirs = ours.double(), theirs.double()
    weights = how.get("weights")
    given = {**how, "weights": weights and torch.tensor(weights).double().tolist()}
    for model in (ours, theirs):
        model.average_adapter("mean", ["one", "two"], set_active=True, **given)
        model.double()
    assert_same_outputs(ours, theirs)
