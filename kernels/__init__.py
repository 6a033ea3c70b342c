"""Tensor operations of the hot path. Installed as ``offload_triforce.kernels``.

``reference`` holds the eager twin of every kernel: plain torch, any device, the meaning of each operation.
"""

# transformers 5.0-5.3 probes for a distribution called "kernels" and reads its version.
__version__ = "0.1.0"
