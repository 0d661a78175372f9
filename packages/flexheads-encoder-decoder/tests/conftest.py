"""What all tests here need: the architecture of both sides of the tiny model."""

import pytest


@pytest.fixture(autouse=True)
def _sides():
    pytest.importorskip("flexheads_bert")
