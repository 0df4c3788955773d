"""Text: sources become documents, documents a token file, tokens batches."""
