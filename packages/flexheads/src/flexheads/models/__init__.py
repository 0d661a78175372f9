"""Models: adapters on any transformers class, and classes with flexible heads."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "AdapterModelMixin": "flexheads.models.adapters.mixin",
        "AutoModelWithHeads": "flexheads.models.auto",
        "ModelWithHeads": "flexheads.models.with_heads",
        "init": "flexheads.models.static",
    },
)
