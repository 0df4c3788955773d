"""The original: where its weights and tokenizer come from, and export back into its formats."""

from workflow.reference.export import export
from workflow.reference.gguf_file import read_tensors
from workflow.reference.load import Reference, architecture_rows, find_in_package, load_reference

__all__ = ["Reference", "architecture_rows", "export", "find_in_package", "load_reference"]
__all__ += ["read_tensors"]
