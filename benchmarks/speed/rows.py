"""The rows of the table: what is measured, in which unit, and what is wanted of flexheads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        key: Its name on the command line and in files.
        title: What is measured.
        over: What is compared with; empty where there is a unit.
        unit: Of numbers that are no ratios.
        wanted: What flexheads should reach at most.
        group: Which plot or run it belongs to.
    """

    key: str
    title: str
    over: str = "bare backbone"
    unit: str = ""
    wanted: float | None = None
    group: str = "forward"


_PASSES = "4 separate passes"
_FULL = "full fine-tuning"
_COMPILED = "compiled bare backbone"
_IMPORTS = "torch and transformers"

ROWS = {
    row.key: row
    for row in (
        Row("attached", "attached, nothing added", wanted=1.005),
        Row("inactive", "one adapter added, none active", wanted=1.005),
        Row("seq_bn", "`seq_bn`", wanted=1.04),
        Row("double_seq_bn", "`double_seq_bn`", wanted=1.06),
        Row("lora", "LoRA, r=8 on query and value", wanted=1.03),
        Row("ia3", "IA³", wanted=1.04),
        Row("prefix_tuning", "prefix tuning, 30 positions", wanted=1.06),
        Row("stack", "Stack of 2 `seq_bn`", wanted=1.06),
        Row("fuse", "Fuse of 3 `seq_bn`", wanted=1.10),
        Row("lora_100", "LoRA, one of 100 loaded", wanted=1.03),
        Row("seq_bn_100", "`seq_bn`, one of 100 loaded", wanted=1.04),
        Row("parallel", "Parallel of 4 `seq_bn`", _PASSES, wanted=0.31),
        Row("rows_8", "Rows over 8 LoRAs, 32 x 16", wanted=1.06),
        Row("rows_32", "Rows over 32 LoRAs, 32 x 16", wanted=1.06),
        Row("heads", "50 classification heads", wanted=1.10),
        Row("training", "training step, `seq_bn`, 4 x 32", _FULL, wanted=0.70, group="training"),
        Row("training_half", "training step, `seq_bn` in the upper half only", _FULL, wanted=0.53,
            group="training"),
        Row("training_lora", "training step, LoRA on query and value", _FULL, group="training"),
        Row("training_fuse", "training step, Fuse of 3 `seq_bn`", _FULL, group="training"),
        Row("kept_full", "activations kept, full fine-tuning, 32 x 128", "", "MiB",
            group="memory"),
        Row("kept", "activations kept, `seq_bn`", "", "MiB", 400, "memory"),
        Row("kept_half", "activations kept, `seq_bn` in the upper half only", "", "MiB", 313,
            "memory"),
        Row("kept_lora", "activations kept, LoRA", "", "MiB", group="memory"),
        Row("kept_full_p0", "activations kept at dropout 0, full fine-tuning", "", "MiB",
            group="memory"),
        Row("kept_p0", "activations kept at dropout 0, `seq_bn`", "", "MiB", 400, "memory"),
        Row("kept_lora_p0", "activations kept at dropout 0, LoRA", "", "MiB", group="memory"),
        Row("add", "add 100 LoRAs", "", "s", 0.15, "managing"),
        Row("load", "load 50 saved LoRAs", "", "s", 0.15, "managing"),
        Row("save", "save 50 LoRAs", "", "s", 0.15, "managing"),
        Row("switch_alone", "activate one of 100 LoRAs", "", "ms", 0.2, "managing"),
        Row("switch", "activate one of 100 LoRAs, with the next call", "", "ms", 0.2, "managing"),
        Row("switch_seq_bn_alone", "activate one of 100 `seq_bn`", "", "ms", 0.2, "managing"),
        Row("switch_seq_bn", "activate one of 100 `seq_bn`, with the next call", "", "ms", 0.2,
            "managing"),
        Row("from_pretrained", "`from_pretrained`", "the plain class", wanted=1.05,
            group="managing"),
        Row("import", "import, ten plugins installed", _IMPORTS, wanted=1.02,
            group="managing"),
        Row("import_registry", "import, registry read", _IMPORTS, wanted=1.02,
            group="managing"),
        Row("import_class", "import, registry and class with heads", _IMPORTS, wanted=1.02,
            group="managing"),
        Row("compiled_seq_bn", "compiled: `seq_bn`", _COMPILED, group="compiled"),
        Row("compiled_lora", "compiled: LoRA", _COMPILED, group="compiled"),
        Row("compiled_ia3", "compiled: IA³", _COMPILED, group="compiled"),
        Row("compiled_prefix_tuning", "compiled: prefix tuning", _COMPILED, group="compiled"),
        Row("compiled_stack", "compiled: Stack of 2", _COMPILED, group="compiled"),
        Row("compiled_fuse", "compiled: Fuse of 3", _COMPILED, group="compiled"),
        Row("compiled_rows_8", "compiled: Rows over 8 LoRAs, 32 x 16", _COMPILED,
            group="compiled"),
        Row("compiled_tasks_8", "compiled: MultiTask of 8 LoRAs, 32 x 16", _COMPILED,
            group="compiled"),
    )
}  # fmt: skip

SIDES = ("flexheads", "floor", "adapters", "peft")
