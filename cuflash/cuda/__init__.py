"""The CUDA backend: run-time compilation, parameters, launches. It knows kernels and CuPy, and no framework."""
