"""A call on a GPU: its plan, run on XLA's stream, with the addresses of XLA's buffers and of a workspace from XLA.

Nothing is allocated and nothing waits, so that XLA may capture a call in a command buffer (a CUDA graph).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax

from cuflash.adapters.jax._call import Call, described, plan_of, signature
from cuflash.cuda.launch import OPERANDS, aligned
from cuflash.cuda.toolchain import import_cupy
from cuflash.errors import UnsupportedError
from cuflash.plans import BackwardPlan, ForwardPlan

if TYPE_CHECKING:
    from cuflash.adapters.jax._handler import Block


def prepare(text: str) -> int:
    """Compile and load the kernels of a call for the GPUs of this process; the bytes of workspace that it needs."""
    prepared = [_prepared(text.encode(), device) for device in devices()]
    return max(each.plan.launches(True).workspace for each in prepared)


def devices() -> list[int]:
    """The numbers of the GPUs of this process. UnsupportedError where there is none."""
    try:
        return [device.local_hardware_id for device in jax.local_devices(backend="cuda")]
    except RuntimeError as error:
        raise UnsupportedError(f"JAX finds no GPU here to prepare kernels for ({error})") from error


class _Prepared(NamedTuple):
    """A call on one GPU."""

    call: Call
    plan: ForwardPlan | BackwardPlan
    places: tuple[int, ...]  # of OPERANDS: which of XLA's operands and results each is; the last, a null, if none


@lru_cache(maxsize=4096)
def _prepared(text: bytes, device: int) -> _Prepared:
    call, operands = described(text)
    signatures = {
        name: signature(name, shape, dtype, f"cuda:{device}")
        for name, (shape, dtype) in zip(call.operands, operands, strict=True)
    }
    given = (*call.operands, *call.results)
    places = tuple(given.index(name) if name in given else len(given) for name in OPERANDS)
    return _Prepared(call, plan_of(signatures, call.options), places)


def run_on_gpu(text: bytes, operands: Sequence[Block], results: Sequence[Block], stream: int) -> None:
    """The operands and results in the order of the call; behind the results the workspace, if there is one."""
    addresses = [block.address for block in (*operands, *results)]
    if not any(addresses):
        return  # all arrays are empty
    runtime = import_cupy().cuda.runtime
    device = runtime.pointerGetAttributes(next(filter(None, addresses))).device
    runtime.setDevice(device)  # a thread of XLA's may have no context yet that a launch could find
    call, plan, places = _prepared(text, device)
    given = len(call.operands) + len(call.results)
    workspace = addresses[given] if len(addresses) > given else 0
    known = (*addresses[:given], 0)
    pointers = tuple([known[place] for place in places])
    if not aligned(pointers):
        raise UnsupportedError("XLA gave a buffer that is not aligned to 16 bytes")
    plan.launches(True).run(stream, pointers, workspace, call.options.seed or 0)
