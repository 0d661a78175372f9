"""The AdapterHub layout of files: the format, and how it names tensors and configurations."""
