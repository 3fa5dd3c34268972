"""A call on a GPU: XLA's buffers as CuPy arrays, through the public functions, on XLA's stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cuflash.adapters.jax._call import Call, run
from cuflash.cuda.toolchain import import_cupy

if TYPE_CHECKING:
    from cuflash.adapters.jax._handler import Block

# Whether XLA may capture a call in a command buffer (a CUDA graph): CuPy allocates in it, which a capture refuses.
CAPTURABLE = False


def run_on_gpu(call: Call, operands: Sequence[Block], results: Sequence[Block], stream: int) -> None:
    """Through CuPy views, on XLA's stream."""
    cupy = import_cupy()
    device = next((_device(cupy, block) for block in operands if block.nbytes), 0)
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Stream(stream)):
        views = [[_cupy(cupy, block, device) for block in side] for side in (operands, results)]
        run(call, *views)


class _Stream:
    """A CUstream as an object of the protocol that CuPy reads."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def _device(cupy: Any, block: Block) -> int:
    return cupy.cuda.runtime.pointerGetAttributes(block.address).device


def _cupy(cupy: Any, block: Block, device: int) -> Any:
    memory = cupy.cuda.UnownedMemory(block.address, block.nbytes, None, device)
    return cupy.ndarray(block.shape, block.dtype, cupy.cuda.MemoryPointer(memory, 0))
