"""Adapter methods: one file for each, registered through the same hook as anyone else's."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "AdapterConfig": "flexheads.methods.config",
        "AdapterMethod": "flexheads.methods.base",
        "load_config": "flexheads.methods.config",
        "ProjectionConfig": "flexheads.methods.projections",
        "ProjectionMethod": "flexheads.methods.projections",
        "ProjectionPart": "flexheads.methods.projections",
        "check_leave_out": "flexheads.methods.base",
        "seeded": "flexheads.methods.base",
    },
)
