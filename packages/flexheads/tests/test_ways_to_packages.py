"""What the error says where no installed package knows a model type."""

from __future__ import annotations

import importlib.metadata

import pytest

import flexheads
from flexheads._registry import first_party
from flexheads.errors import UnknownNameError
from flexheads.plugins import load_registry


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        f'{name}; extra == "all"'
        for name in ("flexheads-acme", "flexheads-acme-mini", "flexheads-roadrunner")
    ]
    lines += ["torch>=2.4", 'flexheads-acme; extra == "encoders"', 'pytest; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)


def said(model_type: str) -> str:
    empty = load_registry(environ={"FLEXHEADS_DISABLE_PLUGINS": "all"})
    with pytest.raises(UnknownNameError) as caught:
        empty.architecture_for(model_type)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "package"),
    [
        ("acme", "flexheads-acme"),
        ("acme-v2", "flexheads-acme"),
        ("acme3_text", "flexheads-acme"),
        ("xl-acme", "flexheads-acme"),
        ("acme-mini", "flexheads-acme-mini"),
    ],
)
def test_a_package_of_ours_is_named(extras: None, model_type: str, package: str) -> None:
    assert f"Try: pip install {package}." in said(model_type)


@pytest.mark.parametrize("model_type", ["subacme", "acmex", "coyote"])
def test_others_are_a_guess_with_a_way_to_write_one(extras: None, model_type: str) -> None:
    text = said(model_type)
    assert f"pip install flexheads-{model_type} (a guess)" in text
    assert "flexheads.describe(model)" in text


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("AcmeV2ModelWithHeads", "flexheads-acme"),
        ("AcmeMiniModelWithHeads", "flexheads-acme-mini"),
        ("CoyoteModelWithHeads", "flexheads-coyote"),
    ],
)
def test_a_class_leads_to_a_package(extras: None, name: str, package: str) -> None:
    with pytest.raises(ImportError, match=f"pip install {package} "):
        getattr(flexheads, name)


def test_the_packages_are_those_of_the_extras(extras: None) -> None:
    assert first_party() == ("flexheads-acme", "flexheads-acme-mini", "flexheads-roadrunner")
