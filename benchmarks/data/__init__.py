"""``python -m benchmarks.data``: from generations to batches, at three sizes."""
