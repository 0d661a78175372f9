"""What goes through files between the two libraries, and how the peer loads it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any


def peer_load(model: Any, folder: Path, **how: Any) -> str:
    """Lets the peer load an adapter, and sees that it found every tensor that it looked for."""
    info: dict[str, Any] = {}
    name = model.load_adapter(
        str(folder), use_safetensors=True, set_active=True, loading_info=info, **how
    )
    # It keeps one module for the prefixes of all layers, and names it once for each layer.
    assert not [key for key in info["missing_keys"] if ".prefix_tuning.pool." not in key]
    # The peer's own files too name the bias of a static language-model head twice.
    assert set(info["unexpected_keys"]) <= {"cls.predictions.bias"}
    return str(name)


def written(kinds: Iterable[str], shared: Collection[str] = ()) -> list[tuple[str, bool]]:
    """Each kind with both kinds of files; the peer cannot write tensors it shares safely."""
    return [
        (kind, safe) for kind in kinds for safe in (False, True) if not (safe and kind in shared)
    ]
