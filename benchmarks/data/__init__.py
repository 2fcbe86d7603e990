"""What it costs to turn generations into batches: ``python -m benchmarks.data``.

May import ``gen`` and ``trainer``; nothing imports it.
"""
