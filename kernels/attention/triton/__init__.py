"""Attention in Triton for any NVIDIA GPU: forward, dQ, and dK with dV.

No atomics: a gradient is the same from run to run. They may import the tile tables of
``kernels.attention`` and each other.
"""
