"""For tests: tiny random models, and the checks that every architecture package passes."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "architecture_checks": "flexheads.testing.conformance",
        "check_static_adapter": "flexheads.testing.static_checks",
        "decoder_checks": "flexheads.testing.decoders",
        "randomise": "flexheads.testing.tiny",
        "tiny_config": "flexheads.testing.tiny",
        "tiny_inputs": "flexheads.testing.tiny",
        "tiny_model": "flexheads.testing.tiny",
        "tiny_output": "flexheads.testing.tiny",
        "tiny_static": "flexheads.testing.tiny",
    },
)
