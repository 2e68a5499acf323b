"""Triton kernels of lightning_hetu, with plain PyTorch reference implementations.

Importing this package is cheap: triton is imported by the operator that needs it, never here. It knows nothing of
Lightning or of ``lightning_hetu``, so an operator can be taken out and used by itself.
"""

__version__ = "0.1.0"
