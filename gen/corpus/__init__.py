"""Documents: read from files or Hugging Face, split, counted; and the tokenizer for them.

The folder it writes is what everything else is keyed by. It imports nothing else of ``gen``.
"""
