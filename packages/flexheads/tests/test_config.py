"""Configurations are values with the names, strings and defaults of the adapters library."""

import json
import pickle
import types

import pytest

from flexheads import (
    AdapterPlusConfig,
    BnConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    load_config,
)
from flexheads.errors import ConfigError, UnknownNameError

ALL = [
    SeqBnConfig(),
    DoubleSeqBnConfig(),
    ParBnConfig(),
    SeqBnInvConfig(),
    AdapterPlusConfig(),
    LoRAConfig(),
    SeqBnConfig(reduction_factor={"0": 4, "default": 8}, leave_out=[1]),
]


@pytest.mark.parametrize("config", ALL, ids=lambda c: type(c).__name__)
def test_a_configuration_comes_back_from_json_and_pickle(config):
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config.replace())
    assert dict(config) == {key: config[key] for key in config}


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("seq_bn", SeqBnConfig()),
        ("pfeiffer", SeqBnConfig()),
        ("houlsby", DoubleSeqBnConfig()),
        ("parallel", ParBnConfig()),
        ("scaled_par_bn", ParBnConfig(scaling="learned")),
        ("pfeiffer+inv", SeqBnInvConfig()),
        ("lora", LoRAConfig()),
        (
            "seq_bn[reduction_factor=12, non_linearity=gelu]",
            SeqBnConfig(reduction_factor=12, non_linearity="gelu"),
        ),
        ("seq_bn[non_linearity='gelu']", SeqBnConfig(non_linearity="gelu")),
        ("lora[r=4, attn_matrices=['q', 'k']]", LoRAConfig(r=4, attn_matrices=["q", "k"])),
        ("houlsby[ln_after=True]", DoubleSeqBnConfig(ln_after=True)),
        (" seq_bn[] ", SeqBnConfig()),
    ],
)
def test_strings_name_configurations(text, config):
    assert load_config(text) == config


def test_none_is_the_default():
    assert load_config(None) == SeqBnConfig()


def test_a_saved_file_is_read(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"config": LoRAConfig(r=3).to_dict(), "name": "x"}))
    assert load_config(str(path)) == LoRAConfig(r=3)
    assert load_config(path) == LoRAConfig(r=3)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        SeqBnConfig().dropout = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_config("seq_bn[reduction_factor]"), "Cannot read"),
        (lambda: load_config("seq_bn[reduction_factor=import os]"), "Cannot read"),
        (lambda: load_config("seq_bn[reduction_factor=open('x')]"), "Cannot read"),
        (lambda: load_config("seq_bn[no_such_field=1]"), "no field 'no_such_field'"),
        (lambda: load_config("seq_bn[]]["), "Cannot read"),
        (lambda: load_config({"mh_adapter": True}), "needs non_linearity"),
        (lambda: load_config("missing.json"), "Cannot read"),
        (lambda: SeqBnConfig(scaling="loud"), "scaling='loud'"),
        (lambda: SeqBnConfig(init_weights="zero"), "init_weights='zero'"),
        (lambda: SeqBnConfig(inv_adapter="flow"), "inv_adapter='flow'"),
        (lambda: SeqBnConfig(dropout=1.5), "dropout=1.5"),
        (lambda: DoubleSeqBnConfig(residual_before_ln="post_add"), "original_ln_before=True"),
        (lambda: SeqBnConfig(reduction_factor=0).factor(0), "positive"),
        (lambda: SeqBnConfig(reduction_factor={"0": 4}).factor(1), "no value for layer 1"),
        (lambda: LoRAConfig(r=0), "positive whole number"),
        (lambda: LoRAConfig(attn_matrices=["q", "z"]), r"\['z'\]"),
        (lambda: LoRAConfig(composition_mode="scale", r=2), "r=1"),
        (lambda: LoRAConfig(composition_mode="times"), "neither"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_unknown_identifier_names_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"'pfeifer'.*Did you mean 'pfeiffer'"):
        load_config("pfeifer")


def test_unknown_fields_of_files_are_left_out_and_of_users_refused(caplog):
    fields = {**SeqBnConfig().to_dict(), "from_the_future": 1}
    assert load_config(fields, tolerant=True) == SeqBnConfig()
    assert "from_the_future" in caplog.text
    with pytest.raises(ConfigError, match="from_the_future"):
        load_config(fields)


def test_the_base_class_needs_what_has_no_default():
    assert BnConfig(True, False, 16, "relu").mh_adapter is True


def test_lora_scales_as_configured():
    assert LoRAConfig(r=4, alpha=8).scaling == 2
    assert LoRAConfig(r=4, alpha=8, rank_stabilized=True).scaling == 4
    assert LoRAConfig(r=1, alpha=3, composition_mode="scale").scaling == 3


def test_public_names_stay_what_they_are_after_everything_is_imported():
    import flexheads.plugins

    assert flexheads.registry is flexheads.plugins.registry
    for name in flexheads.__all__:
        assert not isinstance(getattr(flexheads, name), types.ModuleType), name
