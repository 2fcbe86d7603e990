"""The steps of linear cross-entropy in Triton, and whole losses made of them.

``steps.py`` is what ``kernels.cross_entropy`` uses; the fused variants are for the benchmarks and
for evaluation. They may import ``kernels.cross_entropy.chunked`` and each other.
"""
