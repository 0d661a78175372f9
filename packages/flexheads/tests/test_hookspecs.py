"""The contract: every hook's example runs as it stands, and shows in the registry."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
import textwrap
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

from flexheads import hookspecs, plugins, specs

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "flexheads_spec")}
SHOWN = {
    "flexheads_register_architectures": ("architectures", "acme"),
    "flexheads_register_head_types": ("head_types", "acme-crf"),
    "flexheads_register_adapter_methods": ("methods", "shift"),
    "flexheads_register_conversions": ("conversions", "AcmeForTokenClassification"),
    "flexheads_register_checkpoint_formats": ("formats", "acme"),
}
TABLES = [table for table, _ in SHOWN.values()]


def example(hook):
    """Return the indented block behind "Example::" in a docstring."""
    return textwrap.dedent(inspect.getdoc(hook).partition("Example::")[2])


def test_the_contract_is_five_hooks_and_each_has_a_test():
    assert set(HOOKS) == set(SHOWN)


@pytest.mark.parametrize("name", HOOKS)
def test_the_example_runs_and_shows_in_the_registry(name, monkeypatch):
    plugin = ModuleType("hook_example")
    vars(plugin).update({key: getattr(specs, key) for key in dir(specs) if key[0].isupper()})
    plugin.flexheads = hookspecs  # the public name is flexheads.hookimpl
    exec(example(HOOKS[name]), vars(plugin))
    monkeypatch.setitem(sys.modules, "hook_example", plugin)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())

    found = plugins.load_registry(builtins=["hook_example"])

    table, shown = SHOWN[name]
    assert {key: list(getattr(found, key)) for key in TABLES} == {
        key: [shown] if key == table else [] for key in TABLES
    }


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_collects_and_takes_no_argument(name):
    assert not HOOKS[name].flexheads_spec["firstresult"]
    assert not inspect.signature(HOOKS[name]).parameters


def test_every_kind_of_spec_has_one_hook():
    returned = [get_args(get_type_hints(hook)["return"])[0] for hook in HOOKS.values()]
    assert sorted(map(repr, returned)) == sorted(map(repr, get_args(specs.Spec)))


def test_the_entry_point_group_in_the_prose_is_the_one_that_is_read():
    [group] = re.findall(r"\[project\.entry-points\.(\w+)\]", hookspecs.__doc__)
    assert group == hookspecs.PROJECT == plugins.CORE
