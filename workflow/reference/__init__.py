"""The original model: loads its weights and tokenizer, and exports to its formats."""

from workflow.reference.export import export
from workflow.reference.folder import unequal_tensors
from workflow.reference.gguf_file import read_gguf
from workflow.reference.load import (
    Reference,
    compare_configs,
    load_exported,
    load_for_generation,
    load_reference,
)
from workflow.reference.wheel import find_in_package
