"""Members put together to megadocs, tokenized and written as MDS streams with a manifest.

The contract of a stream is what ``trainer.data`` reads. It may import ``gen.quality``,
``gen.generations`` and ``gen.corpus``.
"""
