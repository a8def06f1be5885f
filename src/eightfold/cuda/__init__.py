"""Device code: CUDA sources in `kernels/`, compiled by NVRTC at first use, kept on disk, launched by cuda-bindings.

No host compiler and no headers are needed. Importing a module of this package imports no CUDA library.
"""
