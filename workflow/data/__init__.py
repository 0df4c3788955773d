"""Data: text files become documents, then a token file, then batches."""

from workflow.data.batches import batch_at, validation_batches
from workflow.data.corpus import Corpus, load_corpus
from workflow.data.documents import read_text
from workflow.data.sources import Source, local_source
