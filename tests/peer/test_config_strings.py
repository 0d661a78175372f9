"""Configurations as strings and as the files of the peer hold them: the same fields."""

from __future__ import annotations

from typing import Any

import pytest

from flexheads import load_config

from .configurations import shared_fields
from .library import PeerConfig

pytestmark = pytest.mark.peer

STRINGS = [
    "seq_bn",
    "pfeiffer",
    "double_seq_bn",
    "houlsby",
    "par_bn",
    "parallel",
    "scaled_par_bn",
    "scaled_parallel",
    "seq_bn_inv",
    "pfeiffer+inv",
    "double_seq_bn_inv",
    "houlsby+inv",
    "lora",
    "seq_bn[reduction_factor=12]",
    "seq_bn[reduction_factor=12, non_linearity='gelu']",
    'seq_bn[reduction_factor=2.5,non_linearity="gelu",leave_out=[0, 1]]',
    "double_seq_bn[reduction_factor={'0': 2, 'default': 8}, scaling='channel']",
    "par_bn[scaling=2.0, residual_before_ln=False, inv_adapter=None]",
    "seq_bn[residual_before_ln='post_add', ln_after=True]",
    "lora[r=4, alpha=16, attn_matrices=['q', 'k', 'v'], use_gating=True]",
    "lora[intermediate_lora=True,output_lora=True,leave_out=[1]]",
    "seq_bn[]",
    "compacter",
    "compacter++",
    "prefix_tuning",
    "prefix_tuning_flat",
    "ia3",
    "vera",
    "dora",
    "dvora",
    "mtl_lora",
]


@pytest.mark.parametrize("text", STRINGS)
def test_configuration_strings(text: str) -> None:
    assert shared_fields(load_config(text)) == PeerConfig.load(text).to_dict()


@pytest.mark.parametrize("changes", [{}, {"reduction_factor": 4, "mh_adapter": True}])
def test_what_files_of_the_peer_call_a_configuration(changes: dict[str, Any]) -> None:
    theirs = PeerConfig.load("seq_bn", **changes)
    assert shared_fields(load_config(theirs.to_dict())) == theirs.to_dict()
