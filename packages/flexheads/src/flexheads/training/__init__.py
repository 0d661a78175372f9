"""Training several heads together, in the stock trainer of transformers."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "LossLog": "flexheads.training.callbacks",
        "MixedDataset": "flexheads.training.datasets",
        "MultiTaskCollator": "flexheads.training.collator",
        "MultiTaskMetrics": "flexheads.training.metrics",
        "OrderedMixture": "flexheads.training.datasets",
        "Task": "flexheads.models.calls.tasks",
        "TaskDataset": "flexheads.training.datasets",
        "Tasks": "flexheads.models.calls.tasks",
        "accuracy": "flexheads.training.metrics",
        "entity_f1": "flexheads.training.metrics",
        "exact_span": "flexheads.training.metrics",
    },
)
