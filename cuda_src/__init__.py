"""The CUDA sources, read as package resources by `cuflash.cuda.jit`; there is no Python here."""
