"""Launches of the kernels: parameters, grids, workspace.

What a call launches depends on its Problem and on how its arrays lie in memory, and is prepared once as a `Plan`: the
kernels, compiled at their first use (cuflash.cuda.jit), and their arguments but for the pointers. A Plan is run with
pointers on any stream, without a synchronisation and without an allocation of its own, whoever the arrays belong to;
`forward` and `backward` do so for CuPy arrays.
"""

from __future__ import annotations

import ctypes
import logging
import math
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from cuflash import dropout, plans, tuning
from cuflash.arrays import Signature, dtype_of
from cuflash.cuda import jit, tensor_map, toolchain
from cuflash.errors import UnsupportedError
from cuflash.spec import Problem, Spec, Tile

if TYPE_CHECKING:
    from cuflash.plans import BackwardPlan, ForwardPlan

logger = logging.getLogger("cuflash")

MAX_LENGTH = 2**29  # tokens: positions and bounds are 32-bit integers in the kernels
_UNBOUNDED = 2**30 - 1024  # a mask's bound beyond every position
_MAX_BLOCKS = 2**31 - 1
_SECTION_BYTES = 2**25  # of the L2 cache
_NARROW = 8  # NARROW of cuda_src/schedule.cuh
_FEW_QUERIES = 64  # up to so many, of long sequences, thread blocks share the keys
_MANY_KEYS = 1024  # that are visited: so many at least
_PART_TILES = 4  # of a part of the keys, at least
_FEWEST_COLS = 16  # of a tile
_NEARLY = 0.96  # of the best share of busy multiprocessors is enough for fewer parts
_MOST_BLOCKS = 3  # on a multiprocessor: as many as registers allow
_MOST_MULTIPROCESSORS = 256  # of any GPU
_SHARED_OF_MULTIPROCESSOR = {750: 65_536, 800: 167_936, 860: 102_400, 870: 167_936, 890: 102_400, 1200: 102_400}
_PAIRED_TILES = 64  # of a head, up to which the Hopper forward works on them in pairs under a mask
_SHARED_SIZE_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

# struct Params of cuda_src/params.cuh: arrays are a pointer and strides, then the scalars, all naturally aligned.
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_STATISTICS = ("lse", "dlse", "delta")
COMMON_PARAMS = (
    *((f"{name}.{field}", "P" if field == "data" else "q") for name in TENSORS
      for field in ("data", "batch_stride", "row_stride", "head_stride")),
    *((f"{name}.{field}", "P" if field == "data" else "q") for name in _STATISTICS
      for field in ("data", "batch_stride", "head_stride")),
    ("dq_sum", "P"), ("dq_turns", "P"), ("tickets", "P"), ("tasks", "P"), ("partial", "P"),
    ("alibi_slopes", "P"), ("alibi_batch_stride", "q"), ("alibi_head_stride", "q"),
    ("sinks", "P"), ("sinks_stride", "q"), ("dsinks", "P"),
    ("cu_seqlens_q", "P"), ("cu_seqlens_k", "P"),
    *((f"keys.r{number}", "Q") for number in range(dropout.ROUNDS)),
    *((name, "i") for name in ("batch", "heads", "group", "q_len", "kv_len", "q_tiles", "kv_tiles", "section_heads",
                             "parts", "part_tiles", "left", "right")),
    ("dropout_limit", "I"), ("dropout_flip", "I"), ("dropout_scale", "f"), ("scale", "f"), ("softcap", "f"),
    *((name, "i") for name in ("cu_seqlens_int64", "alibi_float32", "sinks_float32", "dq_float32", "dk_float32",
                               "dv_float32", "accumulate")),
)  # fmt: skip
DENSE = ("bias", "mask", "dbias")
PARAMS = (
    *COMMON_PARAMS,  # where Params of a kernel without a bias and a mask ends
    *((f"{name}.{field}", "P" if field == "data" else "q") for name in DENSE
      for field in ("data", "batch_stride", "head_stride", "row_stride", "col_stride")),
    ("dbias_sum", "P"), ("dbias_size", "q"), ("bias_float32", "i"),
)  # fmt: skip
PARAMS_STRUCT = struct.Struct("@" + "".join(code for _, code in PARAMS) + "0P")  # padded to the alignment of a pointer
PARAMS_OFFSETS = {
    name: struct.calcsize("@" + "".join(code for _, code in PARAMS[:i]) + "0" + code)
    for i, (name, code) in enumerate(PARAMS)
}
_POINTER = struct.Struct("@P")
# The arrays of a call, in the order in which a Plan takes their pointers, and the parts of the workspace.
OPERANDS = (*TENSORS, "lse", "dlse", "dsinks", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", *DENSE)
WORKSPACE = ("delta", "tickets", "tasks", "partial", "dq_sum", "dq_turns", "dbias_sum")
ZEROED = WORKSPACE[4:]  # those that must be zeros before the call
_WORD = 8  # bytes of a pointer, and of a key
_WORDS = {  # of struct Params: where their pointers are
    name: PARAMS_OFFSETS.get(name, PARAMS_OFFSETS.get(f"{name}.data", -1)) // _WORD for name in (*OPERANDS, *WORKSPACE)
}
_KEYS = PARAMS_OFFSETS["keys.r0"] // _WORD
_ALIGNMENT = 256  # of the parts of the workspace
_RECORD = 32  # bytes of a listed task

Layouts = dict[str, Signature]  # the arrays of a call by their name in OPERANDS, head-minor; those that it has


# ---- what a call launches ----------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What of a GPU decides what a call launches on it."""

    target: toolchain.Target
    multiprocessors: int
    shared_limit: int  # bytes of shared memory that one thread block may have


class Step(NamedTuple):
    """One launch of a call, before its kernel is compiled and without the pointers."""

    kernel: str
    spec: Spec
    tile: Tile
    shared_bytes: int
    blocks: int
    values: dict[str, int | float]  # by the names of PARAMS, the pointers 0
    maps: tuple[tuple[str, int], ...]  # the arrays it gets tensor maps of, in the order of its arguments; rows a copy


class Steps(NamedTuple):
    """All launches of a call, in order, and the parts of the workspace they need: their bytes by their name."""

    launches: tuple[Step, ...]
    workspace: dict[str, int]


class _Arguments:
    """The arguments of one launch in memory, as the driver reads them: an array of their addresses, struct Params, and
    the tensor maps."""

    def __init__(self, params: bytes, maps: Sequence[bytes]) -> None:
        counted = 1 + len(maps)
        start = -(-counted * _WORD // 64) * 64
        places = [start, *(start + -(-len(params) // 64) * 64 + 128 * i for i in range(len(maps)))]
        self._memory = ctypes.create_string_buffer(places[-1] + max(len(params), 128) + 64)
        base = -(-ctypes.addressof(self._memory) // 64) * 64
        addresses = (ctypes.c_void_p * counted).from_address(base)
        for i, (place, content) in enumerate(zip(places, (params, *maps), strict=True)):
            addresses[i] = base + place
            ctypes.memmove(base + place, content, len(content))
        self.address = base
        self.words = (ctypes.c_uint64 * (len(params) // _WORD)).from_address(base + start)
        self.maps = [tensor_map.at(base + place) for place in places[1:]]
        self.filled: Any = None  # what the pointers in it are


class RecipeLaunch(NamedTuple):
    """One launch of a Recipe."""

    kernel: Any  # CuPy's function, which keeps its module loaded; `ptr` is the CUfunction
    geometry: tuple[int, int, int]  # thread blocks, threads of each, bytes of shared memory
    params: bytes  # struct Params, the pointers 0
    operands: tuple[tuple[int, int], ...]  # a word of it, and the place in OPERANDS of the pointer that belongs there
    parts: tuple[tuple[int, int], ...]  # a word of it, and the offset in the workspace of what belongs there
    tensor_maps: tuple[tuple[bytes, int], ...]  # the further arguments, and the place in OPERANDS of each one's array


class Recipe(NamedTuple):
    """A Plan as values, for a runner that is not of Python."""

    device: int
    workspace: int
    zeroed: tuple[int, int]
    launches: tuple[RecipeLaunch, ...]


class _Launch:
    """One launch of a Plan."""

    def __init__(self, function: Any, step: Step, operands: Layouts, parts: dict[str, int]) -> None:
        self.function = function  # keeps its module loaded
        self.geometry = (function.ptr, step.blocks, 1, 1, 32 * step.tile.warps, 1, 1, step.shared_bytes)
        # Words of struct Params: operands by their place in OPERANDS, parts of the workspace by their offset in it.
        self.places = [(_WORDS[name], i) for i, name in enumerate(OPERANDS) if name in operands]
        self.parts = [(_WORDS[name], offset) for name, offset in parts.items()]
        self.drops = step.spec.dropout
        self.mapped = [OPERANDS.index(name) for name, _ in step.maps]
        self.params = PARAMS_STRUCT.pack(*step.values.values())
        self.maps = [tensor_map.encode(operands[name], rows) for name, rows in step.maps]
        self._free: list[_Arguments] = []  # several threads may run a Plan at a time

    def recipe(self) -> RecipeLaunch:
        _, blocks, _, _, threads, _, _, shared_bytes = self.geometry
        return RecipeLaunch(
            kernel=self.function,
            geometry=(blocks, threads, shared_bytes),
            params=self.params,
            operands=tuple(self.places),
            parts=tuple(self.parts),
            tensor_maps=tuple(zip(self.maps, self.mapped, strict=True)),
        )

    def run(self, gpu: _Gpu, stream: int, pointers: Sequence[int], workspace: int, seed: int) -> None:
        try:
            arguments = self._free.pop()
        except IndexError:
            arguments = _Arguments(self.params, self.maps)
        wanted = (pointers, workspace, seed)
        if arguments.filled != wanted:
            words = arguments.words
            for word, operand in self.places:
                words[word] = pointers[operand]
            for word, offset in self.parts:
                words[word] = workspace + offset
            if self.drops:
                words[_KEYS : _KEYS + dropout.ROUNDS] = dropout.round_keys(seed)
            for i, operand in enumerate(self.mapped):
                tensor_map.point(arguments.maps[i], pointers[operand])
            arguments.filled = wanted
        gpu.launch(*self.geometry, stream, arguments.address, 0)
        self._free.append(arguments)


class Plan:
    """What a call launches on one device. `workspace` is how many bytes of memory, of any content, a run needs."""

    def __init__(self, device: int, launches: list[_Launch], workspace: int, zeroed: tuple[int, int]) -> None:
        self.device = device
        self.workspace = workspace
        self._launches = launches
        self._zeroed = zeroed  # the part of the workspace [from, to) that must be zeros

    def recipe(self) -> Recipe | None:
        """The launches as values; None where they depend on the seed."""
        if any(launch.drops for launch in self._launches):
            return None
        return Recipe(self.device, self.workspace, self._zeroed, tuple(launch.recipe() for launch in self._launches))

    def run(self, stream: int, pointers: Sequence[int], workspace: int = 0, seed: int = 0) -> None:
        """Launch the call on a stream (its handle): `pointers` to OPERANDS, 0 for what the call does not have. The LSE
        of a forward is written where there is a pointer."""
        gpu = _gpu()
        if gpu.is_elsewhere(self.device):
            with gpu.cuda.Device(self.device):
                self._run(gpu, stream, pointers, workspace, seed)
        else:
            self._run(gpu, stream, pointers, workspace, seed)

    def _run(self, gpu: _Gpu, stream: int, pointers: Sequence[int], workspace: int, seed: int) -> None:
        first, last = self._zeroed
        if last > first:
            gpu.zero(workspace + first, 0, last - first, stream)
        for launch in self._launches:
            launch.run(gpu, stream, pointers, workspace, seed)


class _Gpu(threading.local):
    """What a call needs of CuPy, looked up once in each thread."""

    def __init__(self) -> None:
        cupy = toolchain.import_cupy()
        self.cuda = cupy.cuda
        self.ndarray = cupy.ndarray
        self.stream = cupy.cuda.get_current_stream
        self.launch = cupy.cuda.driver.launchKernel
        self.zero = cupy.cuda.runtime.memsetAsync
        self._current = cupy.cuda.runtime.getDevice
        cupy.cuda.runtime.setDevice(self._current())  # the driver knows no device in a new thread

    def is_elsewhere(self, device: int) -> bool:
        """Whether another device than this one is the current one."""
        return self._current() != device


@lru_cache(maxsize=1)
def _gpu() -> _Gpu:
    return _Gpu()


def enter_thread() -> None:
    """Let the driver know the current device of a thread in which no Plan has run."""
    _ = _gpu().cuda


def plan(
    problem: Problem,
    layouts: Layouts,
    device: int,
    *,
    aligned: bool,
    backward: bool,
    accumulate: bool = False,
    lean: bool = False,
) -> Plan:
    """The launches of a call, their kernels compiled (several at the same time) and loaded; `aligned` where the
    pointers of all tensors are multiples of 16."""
    enter_thread()  # tensor maps ask the driver
    found = machine(device)
    launches, workspace = steps(
        problem, layouts, found, aligned=aligned, backward=backward, accumulate=accumulate, lean=lean
    )
    jobs = [(step.kernel, step.spec, step.tile, step.shared_bytes, found.target, device) for step in launches]
    for name, spec, tile, *_ in jobs:
        logger.debug("%s %s for %s on device %d", name, tile, spec, device)
    if len(jobs) < 2:
        functions = [_kernel(*job) for job in jobs]
    else:
        with ThreadPoolExecutor(len(jobs)) as pool:
            functions = list(pool.map(lambda job: _kernel(*job), jobs))
    parts, end = {}, 0
    for name, size in workspace.items():
        parts[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    loaded = [_Launch(*pair, layouts, parts) for pair in zip(functions, launches, strict=True)]
    first_zeroed = min((parts[name] for name in ZEROED if name in parts), default=end)
    return Plan(device, loaded, end, (first_zeroed, end))


def compile_backward(problem: Problem, layouts: Layouts, device: int, *, aligned: bool) -> None:
    """Begin to compile what the backward of this forward launches if it is given no gradients to write to. A training
    step's forward asks for the LSE; its own kernels take as long, so this saves half of the first step.

    Threads of their own do it, for which the interpreter waits when it ends; what fails is the backward's to raise.
    """
    gradients = {"dout": "out", "dq": "q", "dk": "k", "dv": "v", "dbias": "bias"}
    likely = layouts | {name: layouts[like] for name, like in gradients.items() if like in layouts}
    found = machine(device)
    try:
        launches, _ = steps(problem, likely, found, aligned=aligned, backward=True)
    except UnsupportedError:
        return
    for step in launches:
        _begin_to_compile(step.kernel, step.spec, step.tile, found.target)


@lru_cache(maxsize=4096)
def _begin_to_compile(*job: Any) -> None:
    def compile_it() -> None:
        try:
            jit.cubin(*job)
        except Exception:
            logger.debug("%s %s cannot be compiled ahead", *job[:2], exc_info=True)

    threading.Thread(target=compile_it, name=f"cuflash {job[0]}").start()


def steps(
    problem: Problem,
    layouts: Layouts,
    machine: Machine,
    *,
    aligned: bool,
    backward: bool,
    accumulate: bool = False,
    lean: bool = False,
) -> Steps:
    """What a call launches on a GPU, which need not be here; `aligned` as for `plan`.

    Raises UnsupportedError for what the kernels cannot do.
    """
    target = machine.target
    tuning.check_supported(problem.spec, target.path)
    if max(problem.q_len, problem.kv_len) > MAX_LENGTH:
        raise UnsupportedError(f"q, k: got lengths {problem.q_len} and {problem.kv_len}; the kernels go to 2^29 tokens")
    hopper = aligned and _takes_hopper(problem, target, layouts, backward)
    spec = replace(_spec_of(problem, layouts, lean), parts=not backward and _takes_parts(problem, machine))
    vector = _vector(problem.spec, layouts) if aligned else _element_bytes(problem.spec)
    if backward and not hopper:
        nothing = problem.kv_len == 0  # nobody would write to a sum of dQ
        spec = tuning.served(replace(spec, lean=spec.lean or nothing), target.path, machine.shared_limit)
    rows = problem.q_len * problem.group if spec.parts else problem.q_len
    names = tuning.kernels_of(spec, backward=backward, hopper=hopper)
    tiles = tuning.tiles_of(names, spec, target.path, vector, machine.shared_limit, rows)
    division = _divide(problem, spec, tiles["forward_portable"], machine) if spec.parts else _WHOLE
    launches = []
    for name, tile in tiles.items():
        q_tiles = _tiles(problem, rows, tile.rows)
        if name == "backward_finish":
            q_tiles = _piece_rows(problem, tiles)
        blocks = _blocks(name, problem, tile, machine.multiprocessors, q_tiles)
        if name == "backward_portable_dq" and spec.bias and spec.deterministic:
            blocks = _ordered_blocks(problem, layouts["dbias"], q_tiles)
        elif name == "forward_portable" and spec.parts:
            blocks = problem.batch * problem.kv_heads * q_tiles * division.parts
        elif name == "backward_bias":
            blocks = -(-_summed(problem, layouts) // (32 * tile.warps))
        if blocks > _MAX_BLOCKS:
            raise UnsupportedError(f"q: got a problem of {blocks} tiles; the kernels go to 2^31 - 1: split the batch")
        if not blocks:
            continue
        section_heads = _section_heads(name, problem, machine.multiprocessors, q_tiles)
        kernel_spec = tuning.kernel_spec(name, spec)
        launches.append(
            Step(
                kernel=name,
                spec=kernel_spec,
                tile=tile,
                shared_bytes=tuning.shared_bytes(name, kernel_spec, tile),
                blocks=blocks,
                values=_params(problem, tile, layouts, q_tiles, section_heads, accumulate, division),
                maps=tuple(
                    (array, side if isinstance(side, int) else getattr(tile, side))
                    for array, side in _MAPPED.get(name, ())
                ),
            )
        )
    return Steps(tuple(launches), _workspace(problem, spec, tiles, layouts, division))


def machine(device: int) -> Machine:
    """A CUDA device as `steps` sees it. Raises as `toolchain.device_target`."""
    return Machine(toolchain.device_target(device), *_limits(device))


def _spec_of(problem: Problem, layouts: Layouts, lean: bool) -> Spec:
    """The Spec of a call with the memory asked for. Lean is always deterministic, but for dbias."""
    ordered = "dbias" in layouts if problem.spec.bias else not lean
    return replace(problem.spec, lean=lean, deterministic=problem.spec.deterministic and ordered)


def _piece_rows(problem: Problem, tiles: dict[str, Tile]) -> int:
    """Into how many rows of pieces of dq_sum the queries of a head are cut: their tiles are those of the kernel that
    adds to it."""
    rows = tiles["backward_finish"].rows
    return _tiles(problem, problem.q_len, rows) * rows // tuning.PIECE


def _workspace(
    problem: Problem, spec: Spec, tiles: dict[str, Tile], layouts: Layouts, division: Division
) -> dict[str, int]:
    """The parts of the workspace that these kernels need, in bytes."""
    sizes = dict.fromkeys(WORKSPACE, 0)
    if "forward_combine" in tiles:  # m, l and O
        sizes["partial"] = 4 * division.parts * problem.statistics * (2 + spec.head_dim_v)
    if "backward_prepare" in tiles:
        sizes["delta"], sizes["tickets"] = 4 * problem.statistics, 4
        sizes["dbias_sum"] = 4 * _summed(problem, layouts)
    if "forward_list" in tiles:
        sizes["tickets"] = 4
        sizes["tasks"] = _list_bytes(problem, _tiles(problem, problem.q_len, tiles["forward_list"].rows))
    if "backward_list" in tiles:
        sizes["tasks"] = _list_bytes(problem, _tiles(problem, problem.kv_len, tiles["backward_list"].cols))
    if "backward_finish" in tiles:
        batch = 1 if spec.packed else problem.batch
        pieces = batch * problem.heads * _piece_rows(problem, tiles) * -(-spec.head_dim // tuning.PIECE)
        sizes["dq_sum"] = 4 * pieces * tuning.PIECE**2
        sizes["dq_turns"] = 4 * pieces if spec.deterministic else 0
    return {name: size for name, size in sizes.items() if size}


def _list_bytes(problem: Problem, tiles: int) -> int:
    """Of a list of tasks (cuda_src/list.cuh): a record of their number, one of each, and where each sequence starts."""
    return _RECORD * (1 + tiles) + 4 * (problem.batch + 1)


def workspace_bound(problem: Problem, *, backward: bool, lean: bool) -> int:
    """The most workspace in bytes that a call without a bias needs, whichever kernels serve it; nothing is compiled for
    it."""
    largest = Machine(toolchain.Target.named("sm_90a"), _MOST_MULTIPROCESSORS, tuning.SHARED_MEMORY[900])
    spec = replace(_spec_of(problem, {}, lean), parts=not backward and _takes_parts(problem, largest))
    parts = _most_parts(-(-_visited_keys(problem) // _FEWEST_COLS) + 1) if spec.parts else 1
    bounds = []
    for hopper in {False, tuning.has_hopper(spec, backward=backward)}:
        wanted = tuning.served(spec, 900) if backward and not hopper else spec
        tiles = tuning.tiles_of(tuning.kernels_of(wanted, backward=backward, hopper=hopper), wanted, 900, 16)
        sizes = _workspace(problem, wanted, tiles, {}, Division(parts, 0))
        bounds.append(sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()))
    return max(bounds)


def aligned(pointers: Sequence[int]) -> bool:
    """Whether the tensors among the pointers to OPERANDS are all at multiples of 16, as the widest copies need them."""
    q, k, v, out, dout, dq, dk, dv, *_ = pointers
    return (q | k | v | out | dout | dq | dk | dv) % 16 == 0


# ---- on CuPy arrays ----------------------------------------------------------------------------------------------


def forward(plan: ForwardPlan, inputs: Sequence[Any], seed: int, with_lse: bool) -> tuple[Any, Any]:
    """(out, lse or None) from CuPy's pool, on the current stream of the inputs' device; these as in plans.INPUTS."""
    gpu = _gpu()
    if gpu.is_elsewhere(plan.device):
        with gpu.cuda.Device(plan.device):
            return forward(plan, inputs, seed, with_lse)
    out = gpu.ndarray(plan.out.shape, dtype_of(plan.out.dtype))
    lse = gpu.ndarray(plan.lse.shape, dtype_of(plan.lse.dtype)) if with_lse else None
    q, k, v, *extras = inputs
    pointers = (
        *(q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr, 0, 0, 0, 0),
        *(0 if lse is None else lse.data.ptr, 0, 0),
        *[0 if array is None else array.data.ptr for array in extras],
        0,
    )
    _run(gpu, plan, pointers, seed, with_lse)
    return out, lse


def backward(plan: BackwardPlan, arrays: Sequence[Any], given: Sequence[Any], seed: int) -> list[Any]:
    """dq, dk, dv, with sinks dsinks and with a bias dbias, those not given from CuPy's pool as the workspace is;
    `arrays` are dout, out, lse, dlse and the inputs.

    Only the sum of dQ, where 16-bit types have one, and that of a broadcast bias are atomic: where the Spec is
    deterministic, or memory is lean and no bias is broadcast, the gradients are bitwise reproducible.
    """
    gpu = _gpu()
    if gpu.is_elsewhere(plan.device):
        with gpu.cuda.Device(plan.device):
            return backward(plan, arrays, given, seed)
    gradients = plans.targets(plan, given, lambda like: gpu.ndarray(like.shape, dtype_of(like.dtype)))
    dout, out, lse, dlse, q, k, v, *extras = arrays
    found = dict(zip(plan.gradients, gradients, strict=True))
    operands = (q, k, v, out, dout, *gradients[:3], lse, dlse, found.get("dsinks"), *extras, found.get("dbias"))
    pointers = tuple([0 if array is None else array.data.ptr for array in operands])
    _run(gpu, plan, pointers, seed)
    return gradients


def _run(
    gpu: _Gpu, plan: ForwardPlan | BackwardPlan, pointers: Sequence[int], seed: int, backward_too: bool = False
) -> None:
    """Launch a plan on the current stream, with a workspace from CuPy's pool if it needs one."""
    launches = plan.launches(aligned(pointers), backward_too)
    stream = gpu.stream().ptr
    if not launches.workspace:
        launches._run(gpu, stream, pointers, 0, seed)
        return
    workspace = gpu.cuda.alloc(launches.workspace)
    launches._run(gpu, stream, pointers, workspace.ptr, seed)
    if gpu.cuda.runtime.streamIsCapturing(stream):
        _CAPTURED.append(workspace)  # a graph goes on using it after this call


_CAPTURED: list[Any] = []  # workspace of calls inside captured graphs


# ---- kernels and tiles -------------------------------------------------------------------------------------------

# The arrays that a kernel loads by tensor maps, in the order of its arguments, and the side of its tile they follow, or
# the rows of a copy.
_OPERANDS = (("q", "rows"), ("k", "cols"), ("v", "cols"))
_MAPPED: dict[str, tuple[tuple[str, str | int], ...]] = {
    "forward_hopper": (("q", 64), *_OPERANDS[1:], ("out", 16)),
    "backward_hopper": (*_OPERANDS, ("dout", "rows")),
    "backward_hopper_wide": (*_OPERANDS, ("dout", "rows")),
    "backward_hopper_dq": (*_OPERANDS, ("dout", "rows")),
}


@lru_cache(maxsize=4096)
def _kernel(name: str, spec: Spec, tile: Tile, shared_bytes: int, target: toolchain.Target, device: int) -> Any:
    """A kernel's function, loaded on a device."""
    cupy = toolchain.import_cupy()
    with cupy.cuda.Device(device):  # this may be a thread of its own
        function = jit.kernel(name, spec, tile, target)
        cupy.cuda.driver.funcSetAttribute(function.ptr, _SHARED_SIZE_ATTRIBUTE, shared_bytes)
    return function


@lru_cache
def _limits(device: int) -> tuple[int, int]:
    """How many multiprocessors a device has, and how much shared memory one thread block may have: a forced path must
    fit the GPU that is there."""
    attributes = toolchain.import_cupy().cuda.Device(device).attributes
    return attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]


def _takes_hopper(problem: Problem, target: toolchain.Target, layouts: Layouts, backward: bool) -> bool:
    """Whether a call gets the Hopper kernels: they need a positive scale and what tensor maps can express."""
    return (
        target == toolchain.Target.named("sm_90a")
        and tuning.has_hopper(problem.spec, backward=backward)
        and problem.scale > 0
        and all(
            0 not in layouts[name].shape and tensor_map.expressible(layouts[name])
            for name in ("q", "k", "v", "dout" if backward else "out")
        )
    )


class Division(NamedTuple):
    """How thread blocks share the keys of a forward: into how many parts they are divided, of how many tiles."""

    parts: int
    tiles: int


_WHOLE = Division(1, 0)  # where they do not


def _takes_parts(problem: Problem, machine: Machine) -> bool:
    """Whether thread blocks share the keys: of few queries, whose own tiles are too few for the GPU, or so small that
    the time goes into reading the keys of a group again for each of its heads."""
    rows = problem.q_len * problem.group
    return (
        tuning.has_parts(problem.spec)
        and 0 < problem.q_len <= _FEW_QUERIES
        and _visited_keys(problem) >= _MANY_KEYS
        and problem.batch * problem.heads > 0
        and (rows <= tuning.FEW_ROWS or problem.batch * problem.heads < machine.multiprocessors)
    )


def _visited_keys(problem: Problem) -> int:
    """The most keys that the queries may attend to, from the first to the last."""
    left, _ = _bounds(problem)
    return min(problem.kv_len, problem.q_len + left)


def _divide(problem: Problem, spec: Spec, tile: Tile, machine: Machine) -> Division:
    """The fewest parts of the keys with which the GPU is nearly as full as it gets, also when the last thread blocks
    run."""
    visited = _visited_keys(problem)
    tiles = min(-(-problem.kv_len // tile.cols), -(-visited // tile.cols) + 1)
    shared = _SHARED_OF_MULTIPROCESSOR.get(machine.target.path, 233_472)
    block = tuning.shared_bytes("forward_portable", spec, tile) + tuning.RESERVED
    places = machine.multiprocessors * max(1, min(shared // block, _MOST_BLOCKS))
    whole = problem.batch * problem.kv_heads * -(-problem.q_len * problem.group // tile.rows)
    counts = range(1, _most_parts(tiles) + 1)
    full = [whole * parts / (places * -(-whole * parts // places)) for parts in counts]
    parts = next(parts for parts, share in zip(counts, full, strict=True) if share >= _NEARLY * max(full))
    of_part = -(-tiles // parts)
    return Division(-(-tiles // of_part), of_part)


def _most_parts(tiles: int) -> int:
    return min(max(1, tiles // _PART_TILES), tuning.MOST_PARTS)


def _section_heads(name: str, problem: Problem, multiprocessors: int, q_tiles: int) -> int:
    """How many heads' tiles are worked on together, so that what their blocks share stays in the L2 cache."""
    if name in ("forward_hopper", "backward_hopper_dq"):  # as many as fill the multiprocessors once
        return max(1, round(multiprocessors / q_tiles))
    if name in ("backward_hopper", "backward_hopper_wide"):  # Q and dO of a group's heads
        head_bytes = 2 * problem.q_len * (problem.spec.head_dim + problem.spec.head_dim_v) * problem.group
        return max(1, _SECTION_BYTES // head_bytes)
    return 1


def _element_bytes(spec: Spec) -> int:
    return 4 if spec.dtype == "float32" else 2


def _vector(spec: Spec, layouts: Layouts) -> int:
    """Bytes that one copy instruction can move: 16 where every row of every tensor is aligned, else an element's."""
    element_bytes = _element_bytes(spec)
    if spec.head_dim * element_bytes % 16 or spec.head_dim_v * element_bytes % 16:
        return element_bytes
    for tensor in (layouts[name] for name in TENSORS if name in layouts):
        for stride, length in zip(tensor.strides[:-1], tensor.shape[:-1], strict=True):
            if length > 1 and stride * dtype_of(tensor.dtype).itemsize % 16:
                return element_bytes
    return 16


# ---- grids and parameters ----------------------------------------------------------------------------------------


def _bounds(problem: Problem) -> tuple[int, int]:
    """The mask's bounds as the kernels take them."""
    left, right = (
        _UNBOUNDED if side is None else min(side, _UNBOUNDED) for side in (problem.mask.left, problem.mask.right)
    )
    return left, right


def _tiles(problem: Problem, length: int, rows: int) -> int:
    """Tiles of a head: exact when dense; packed, the bound of cuda_src/schedule.cuh with one range for rows outside."""
    return length // rows + problem.batch + 1 if problem.spec.packed else -(-length // rows)


def _blocks(name: str, problem: Problem, tile: Tile, multiprocessors: int, q_tiles: int) -> int:
    """Thread blocks of a kernel's grid."""
    batch = 1 if problem.spec.packed else problem.batch  # packed sequences share one range of tiles
    heads = problem.heads * batch
    q_blocks = q_tiles * heads
    kv_blocks = _tiles(problem, problem.kv_len, tile.cols) * problem.kv_heads * batch
    left, right = _bounds(problem)
    uneven = problem.spec.bounded_left or problem.spec.bounded_right
    if problem.spec.bounded_left and problem.spec.bounded_right:
        uneven = left + right >= problem.kv_len // _NARROW

    counts: dict[str, Callable[[], int]] = {
        "forward_list": lambda: 1,
        "backward_list": lambda: 1,
        "forward_portable": lambda: q_blocks,
        "forward_combine": lambda: problem.statistics,
        # Equal tiles, equal pairs of tiles of which there are enough, or listed ones: each multiprocessor loops over
        # its share. Few or very long tiles under a mask: a block each, so that a multiprocessor that is done takes the
        # next.
        "forward_hopper": lambda: (
            q_blocks
            if uneven
            and not problem.spec.packed
            and (q_tiles > _PAIRED_TILES or (q_tiles + 1) // 2 * heads <= 3 * multiprocessors)
            else min(q_blocks, multiprocessors)
        ),
        "backward_prepare": lambda: -(-problem.q_len * batch // tile.rows),
        "backward_sinks": lambda: problem.heads,
        "backward_portable": lambda: kv_blocks,
        "backward_portable_dq": lambda: q_blocks,
        "backward_hopper": lambda: min(kv_blocks, multiprocessors),
        "backward_hopper_wide": lambda: min(kv_blocks, multiprocessors),
        "backward_hopper_dq": lambda: q_blocks,
        "backward_finish": lambda: q_blocks * -(-problem.spec.head_dim // tile.cols),
        "backward_bias": lambda: 0,  # unless dbias is a sum
    }
    return counts[name]()


def _summed(problem: Problem, layouts: Layouts) -> int:
    """Elements of dbias that are sums: all where the bias is broadcast, else none, as each is written at once."""
    whole = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    return math.prod(layouts["dbias"].shape) if "dbias" in layouts and layouts["dbias"].shape != whole else 0


def _ordered_blocks(problem: Problem, dbias: Signature, q_tiles: int) -> int:
    """Thread blocks of the kernel of dQ, each with elements of dbias of its own, which it adds to in a fixed order."""
    counts = zip((problem.batch, problem.heads, q_tiles), dbias.strides, strict=False)
    return math.prod(count if stride else 1 for count, stride in counts)


def _params(
    problem: Problem,
    tile: Tile,
    layouts: Layouts,
    q_tiles: int,
    section_heads: int,
    accumulate: bool,
    division: Division,
) -> dict[str, int | float]:
    """The fields of struct Params, by the names of PARAMS and in their order; the pointers are 0."""
    left, right = _bounds(problem)
    limit, keeps = dropout.limit(problem.dropout_p)
    values: dict[str, Any] = dict.fromkeys((name for name, _ in PARAMS), 0)
    for name, fields in (
        *((name, ("batch_stride", "row_stride", "head_stride")) for name in TENSORS),
        *((name, ("batch_stride", "head_stride")) for name in _STATISTICS),
    ):
        if name == "delta":  # in the workspace, packed [batch, heads, q_len]
            values["delta.batch_stride"], values["delta.head_stride"] = problem.heads * problem.q_len, problem.q_len
        elif name in layouts:  # packed arrays have no batch axis: its stride stays 0
            strides = layouts[name].strides[:-1]
            for field, stride in zip(fields[-len(strides) :], strides, strict=True):
                values[f"{name}.{field}"] = stride
    if "alibi_slopes" in layouts:
        *batch_stride, values["alibi_head_stride"] = layouts["alibi_slopes"].strides
        values["alibi_batch_stride"] = batch_stride[0] if batch_stride else 0
    for name in DENSE:
        if name in layouts:
            for field, stride in zip(("batch", "head", "row", "col"), layouts[name].strides, strict=True):
                values[f"{name}.{field}_stride"] = stride
    if "dbias" in layouts:
        values["dbias_size"] = math.prod(layouts["dbias"].shape)
    if "sinks" in layouts:
        (values["sinks_stride"],) = layouts["sinks"].strides
    values |= {
        "batch": problem.batch,
        "heads": problem.heads,
        "group": problem.group,
        "q_len": problem.q_len,
        "kv_len": problem.kv_len,
        "q_tiles": q_tiles,
        "kv_tiles": _tiles(problem, problem.kv_len, tile.cols),
        "section_heads": section_heads,
        "parts": division.parts,
        "part_tiles": division.tiles,
        "left": left,
        "right": right,
        "dropout_limit": limit * 0x10001,
        "dropout_flip": 0 if keeps else 0xFFFFFFFF,
        "dropout_scale": 1 / (1 - problem.dropout_p),
        "scale": problem.scale,
        "softcap": problem.softcap or 0.0,
        "cu_seqlens_int64": "cu_seqlens_q" in layouts and layouts["cu_seqlens_q"].dtype == "int64",
        "accumulate": accumulate,
    }
    for field, name in (("alibi", "alibi_slopes"), *((name, name) for name in ("sinks", "bias", "dq", "dk", "dv"))):
        values[f"{field}_float32"] = name in layouts and layouts[name].dtype == "float32"
    return values
