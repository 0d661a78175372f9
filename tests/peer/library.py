"""The `adapters` library, or a skip of the whole test file that asks for it.

Everything here takes the library from this module, so that only this one has to wait for the skip.
"""

from __future__ import annotations

from typing import Any

import pytest

adapters: Any = pytest.importorskip("adapters", exc_type=ImportError)
PeerConfig, BertAdapterModel = adapters.AdapterConfig, adapters.BertAdapterModel
