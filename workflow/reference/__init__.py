"""The original: where its weights and tokenizer come from, and export back into its formats."""
