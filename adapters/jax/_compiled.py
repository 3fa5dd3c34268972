"""A call on a GPU without Python: each launch of its plan is a custom call of XLA that holds the kernel's machine code.

XLA launches the kernels by itself, through jaxlib's `triton_kernel_call_ffi` (`_kernel_call`): pointers are those of
XLA's buffers, tensor maps are encoded for them at each launch, and everything else is known while JAX lowers a program.
The maps are parameters of the kernel, so nothing has to be fenced. The parts of the workspace are results of the launch
that writes them first and operands of those behind it: XLA knows all that a launch depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxlib import version as jaxlib_version

from cuflash import dropout
from cuflash.adapters.jax import _gpu, _kernel_call
from cuflash.adapters.jax._call import Call, plan_of, signature
from cuflash.arrays import Signature
from cuflash.cuda import jit, tensor_map, toolchain
from cuflash.cuda.flat import Flat, flat
from cuflash.cuda.launch import TENSORS, ZEROED, Machine, Step, machine
from cuflash.errors import UnsupportedError

_OLDEST = (0, 11, 2)  # the first jaxlib whose kernel calls take tensor maps
_UNKNOWN = (0, 12)  # the first that was not tried

_DTYPES = {"dq_turns": jnp.int32, "tickets": jnp.int32, "tasks": jnp.int32}  # of the workspace; the others are float32


class Gpu(NamedTuple):
    """The GPUs of this process, which are all alike."""

    capability: tuple[int, int]
    machine: Machine


def gpu() -> Gpu:
    """What kernels are compiled for. UnsupportedError where there is no GPU, or where they differ."""
    found = {Gpu(toolchain.capability(device), machine(device)) for device in _gpu.devices()}
    if len(found) > 1:
        raise UnsupportedError(f"the GPUs of this process differ: {sorted(each.capability for each in found)}")
    return found.pop()


def obstacle(*, tried_only: bool = True) -> str | None:
    """Why the installed jaxlib cannot launch our kernels, or None; `tried_only` counts being too new to know."""
    version, name = tuple(jaxlib_version.__version_info__), f"jaxlib {jaxlib_version.__version__}"
    if version < _OLDEST:
        return f"{name} is older than {'.'.join(map(str, _OLDEST))}"
    if tried_only and version >= _UNKNOWN:
        return f"{name} was not tried"
    return _difference()


@lru_cache(maxsize=1)
def _difference() -> str | None:
    """How the messages that jaxlib makes differ from those written here, or None."""
    try:
        theirs: Any = import_module("jaxlib.gpu_triton")
        arguments = [
            theirs.create_tma_descriptor_parameter(
                elem_type=9, swizzle=3, shape=[2, 700, 64], strides=[44800, 64, 1], block_shape=[1, 128, 64], oob_fill=0
            ),
            theirs.create_array_parameter(4096, 16),
            theirs.create_scalar_parameter(-3, "i64"),
            theirs.create_scalar_parameter(0, "i32"),
            theirs.create_scalar_parameter(0.5, "fp32"),
        ]
        kernel = theirs.TritonKernel("entry", 4, 1, 1024, "ptx", "", 90)
        expected = theirs.TritonKernelCall(kernel, 7, 1, 1, arguments).to_proto("entry", b"")
    except (ImportError, AttributeError, TypeError) as error:
        return f"jaxlib's GPU plugin lacks what it takes ({error})"
    ours = [
        _kernel_call.tensor_map("bfloat16", (64, 700, 2), (128, 89600), (64, 128, 1)),
        _kernel_call.pointer(divisor=16, zeroed=4096),
        _kernel_call.number("q", -3),
        _kernel_call.number("i", 0),
        _kernel_call.number("f", 0.5),
    ]
    written = _kernel_call.message(_kernel_call.Kernel("entry", b"", 4, 1024, (9, 0), 7), ours, "ptx")
    return None if written == expected else "jaxlib's messages to its GPU plugin have another form"


def launch(call: Call, found: Gpu, types: Sequence[Any], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """A call on the arrays of one device, as custom calls; `types` are the JAX types of its results."""
    signatures = {
        name: signature(name, x.shape, x.dtype.name, "cuda:0") for name, x in zip(call.operands, arrays, strict=True)
    }
    steps, layouts = plan_of(signatures, call.options).steps(found.machine)
    entries = [flat(step, {*layouts, *steps.workspace}) for step in steps.launches]
    result_types = dict(zip(call.results, types, strict=True))
    sharding = types[0].sharding.update(spec=PartitionSpec(None))
    for name, size in steps.workspace.items():
        result_types[name] = types[0].update(
            shape=(size // 4,), dtype=jnp.dtype(_DTYPES.get(name, jnp.float32)), sharding=sharding
        )

    buffers = dict(zip(call.operands, arrays, strict=True))

    def buffer(name: str) -> jax.Array:
        return buffers[name] if name in buffers else _zeros(result_types[name])

    for step, entry, cubin in zip(steps.launches, entries, _cubins(steps.launches, entries, found), strict=True):
        kernel = _kernel_call.Kernel(
            entry=entry.entry,
            cubin=cubin,
            warps=step.tile.warps,
            shared_bytes=step.shared_bytes,
            capability=found.capability,
            blocks=step.blocks,
        )
        arguments = _arguments(step, entry, layouts, steps.workspace, call.options.seed or 0)
        run = jax.ffi.ffi_call(
            _kernel_call.TARGET,
            [result_types[name] for name in entry.writes],
            input_output_aliases={
                entry.reads.index(name): i for i, name in enumerate(entry.writes) if name in entry.reads
            },
        )
        written = run(*map(buffer, entry.reads), name=entry.entry, opaque=_kernel_call.opaque(kernel, arguments))
        buffers.update(zip(entry.writes, written, strict=True))
    return tuple(map(buffer, call.results))


def _cubins(steps: Sequence[Step], entries: Sequence[Flat], found: Gpu) -> list[bytes]:
    """The machine code of the launches, compiled at the same time."""
    jobs = [
        (step.kernel, step.spec, step.tile, found.machine.target, entry.text)
        for step, entry in zip(steps, entries, strict=True)
    ]
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        return list(pool.map(lambda job: jit.cubin(*job), jobs))


def _arguments(
    step: Step, entry: Flat, layouts: dict[str, Signature], workspace: dict[str, int], seed: int
) -> list[bytes]:
    """The arguments of a flat entry, in its order."""
    arguments = []
    for name in (*entry.reads, *entry.writes):
        if name in entry.maps:
            arguments.append(_kernel_call.tensor_map(*tensor_map.describe(layouts[name], entry.maps[name])))
        else:
            zeroed = workspace[name] if name in ZEROED and name in entry.writes else 0
            arguments.append(_kernel_call.pointer(divisor=16 if name in TENSORS else 0, zeroed=zeroed))
    values = step.values | {f"keys.r{number}": key for number, key in enumerate(dropout.round_keys(seed))}
    return arguments + [_kernel_call.number(code, values[name]) for name, code in entry.numbers]


def _zeros(like: Any) -> jax.Array:
    """What no launch writes: a sum of nothing, or a result without elements."""
    varying = tuple(sorted(like.manual_axis_type.varying))
    zeros = jnp.zeros(like.shape, like.dtype)
    return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros
