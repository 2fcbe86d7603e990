"""Attention over one packed token axis whose segment borders (``cu_seqlens``) are data.

``interface.py`` checks the arguments and chooses a backend, one module each: PyTorch's own
functions, and our kernels for any NVIDIA GPU (``triton/``) and for Hopper (``sm90/``). It may
import nothing of the other packages; its kernels are imported where they are called, because
Triton is missing on some machines.
"""
