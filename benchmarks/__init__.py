"""`python -m benchmarks` is `cuflash bench`, from a checkout; the folder `results` holds what it measured."""
