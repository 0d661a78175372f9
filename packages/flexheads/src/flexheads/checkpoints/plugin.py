"""The core's own checkpoint formats, registered like anyone else's."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads.hookspecs import hookimpl
from flexheads.specs import CheckpointFormat


@hookimpl
def flexheads_register_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layout that the `adapters` library reads and writes."""
    return [
        CheckpointFormat(
            name="adapterhub",
            format="flexheads.checkpoints.hub.format:AdapterHubFormat",
            description="adapter_config.json beside adapter.safetensors or pytorch_adapter.bin",
        )
    ]
