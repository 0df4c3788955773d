"""Text: sources become documents, documents a token file, tokens batches."""

from workflow.data.batches import batch_at, validation_batches
from workflow.data.corpus import Corpus, load_corpus
from workflow.data.documents import read_text
from workflow.data.sources import Source, from_path

__all__ = ["Corpus", "Source", "batch_at", "from_path", "load_corpus", "read_text"]
__all__ += ["validation_batches"]
