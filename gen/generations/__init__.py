"""What a model wrote for each document: the job that asks for it and the store that keeps it.

The store is append-only parts, so a killed job loses at most what was in flight. It may import
``gen.client``, ``gen.serving``, ``gen.corpus`` and ``gen.prompts``.
"""
