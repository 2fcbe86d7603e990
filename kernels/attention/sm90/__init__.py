"""Warp-specialised attention for sm_90 in Gluon: forward, dQ, and dK with dV.

TMA loads, ``wgmma`` and a pipeline of warp groups; ``gluon_compat.py`` holds what differs between
the releases of Triton. They may import the tile tables of ``kernels.attention`` and each other.
"""
