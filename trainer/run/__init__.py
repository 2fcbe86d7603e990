"""What a run leaves on the disk and takes up again: folder, checkpoints, metrics, exports.

A file is complete or not there, and a finished run is not repeated. It may import everything of
``trainer`` but the loop, ``trainer.evaluation`` and ``trainer.study``.
"""
