"""`python -m benchmarks`: the command line of `cuflash bench`."""

import sys

from cuflash.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
