"""From MDS streams to packed batches: which document is read when, and where it is put.

The plan is a pure function of the seed and the document lengths, so batch *n* can be computed from
*n* alone. It may import ``trainer.config`` and what every program shares.
"""
