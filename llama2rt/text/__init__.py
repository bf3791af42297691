"""Text in, token ids out: the tokenizer and the Llama-2 chat format."""
