"""A call on a GPU: a plan run with the addresses of XLA's buffers, on XLA's stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cuflash.adapters.jax._call import Call, planned, signature
from cuflash.cuda.toolchain import import_cupy

if TYPE_CHECKING:
    from cuflash.adapters.jax._handler import Block

# Whether XLA may capture a call in a command buffer (a CUDA graph): the backward allocates its workspace, which a
# capture refuses.
CAPTURABLE = False


def run_on_gpu(call: Call, operands: Sequence[Block], results: Sequence[Block], stream: int) -> None:
    """Launch on XLA's stream; the workspace of the backward comes from CuPy's pool."""
    cupy = import_cupy()
    blocks = dict(zip((*call.operands, *call.results), (*operands, *results), strict=True))
    device = next((_device(cupy, block) for block in operands if block.nbytes), 0)
    plan = _plan(call, tuple((block.shape, block.dtype.name) for block in operands), device)
    from cuflash.cuda import launch

    addresses = [blocks[name].address if name in blocks else 0 for name in launch.OPERANDS]
    aligned = all(address % 16 == 0 for address in addresses[: len(launch.TENSORS)])
    launches = plan.launches(aligned)
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Stream(stream)):
        workspace = cupy.cuda.alloc(launches.workspace) if launches.workspace else None
        launches.run(stream, tuple(addresses), workspace.ptr if workspace else 0, call.options.seed or 0)


@lru_cache(maxsize=1024)
def _plan(call: Call, operands: tuple[tuple[tuple[int, ...], str], ...], device: int) -> Any:
    arrays = {
        name: signature(name, shape, dtype, f"cuda:{device}")
        for name, (shape, dtype) in zip(call.operands, operands, strict=True)
    }
    return planned(arrays, call.options)


class _Stream:
    """A CUstream as an object of the protocol that CuPy reads."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def _device(cupy: Any, block: Block) -> int:
    return cupy.cuda.runtime.pointerGetAttributes(block.address).device
