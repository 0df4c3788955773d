"""The original: where its weights and tokenizer come from, and export back into its formats."""

from workflow.reference.export import export
from workflow.reference.gguf_file import read_tensors
from workflow.reference.hub import snapshot
from workflow.reference.load import (
    Provenance,
    Reference,
    architecture_rows,
    find_in_package,
    hf_config,
    load_reference,
)

__all__ = [
    "Provenance",
    "Reference",
    "architecture_rows",
    "export",
    "find_in_package",
    "hf_config",
    "load_reference",
    "read_tensors",
    "snapshot",
]
