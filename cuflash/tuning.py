"""Which kernel and tile a Spec gets, by pure functions that need no GPU."""

from __future__ import annotations

from dataclasses import replace

from cuflash.errors import UnsupportedError
from cuflash.spec import Spec, Tile

# Bytes of shared memory a thread block may use, by code path (100 * major + 10 * minor); CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability".
SHARED_MEMORY = {
    750: 65_536,
    800: 166_912,
    860: 101_376,
    870: 166_912,
    890: 101_376,
    900: 232_448,
    1000: 232_448,
    1100: 232_448,
    1200: 101_376,
}
RESERVED = 1024  # which the system takes for each thread block: a multiprocessor has so much more than a block may use
MAX_HEAD_DIM = 256  # of the portable kernels


def numpy_tile(q_len: int, kv_len: int, itemsize: int) -> Tile:
    """The NumPy backend's tile: score tiles that stay in a core's cache, few enough for Python's cost to vanish."""
    rows, cols = (256, 512) if itemsize <= 4 else (128, 256)
    return Tile(rows=min(rows, max(q_len, 1)), cols=min(cols, max(kv_len, 1)))


# Tiles of the portable kernels as (rows, cols, stages, warps, split, blocks), by kernel, width of an element in bytes
# and the head dimension they reach. The first of which `blocks` fit into a multiprocessor's shared memory is taken.
# Registers decide rows and split: a warp keeps 16 rows of every accumulator, head_dim / 2 / split registers a lane
# each, and no variant may spill but some of float32, whose terms take registers: the forward with 32 rows a warp at
# head_dim 128 by 120 bytes, stored and loaded (1.2 to 1.8 times as fast as with 16 rows), a few others by 8 to 80.
_PORTABLE = {
    ("forward_portable", 2): {
        64: ((64, 64, 2, 4, 1, 1), (64, 64, 1, 4, 1, 1)),
        128: ((64, 64, 2, 4, 1, 1), (64, 32, 2, 4, 1, 1), (64, 64, 1, 4, 1, 1)),
        192: ((64, 64, 1, 4, 1, 2), (128, 64, 1, 8, 1, 1), (64, 64, 1, 4, 1, 1), (32, 32, 1, 2, 1, 1)),
        256: ((64, 64, 1, 4, 1, 2), (128, 64, 1, 8, 1, 1), (64, 64, 1, 4, 1, 1), (32, 32, 1, 4, 2, 1)),
    },
    ("forward_portable", 4): {
        64: ((128, 32, 1, 4, 1, 2), (64, 32, 1, 4, 1, 2), (64, 32, 1, 4, 1, 1)),
        128: ((128, 32, 1, 4, 1, 2), (128, 32, 2, 8, 1, 1), (128, 32, 1, 4, 1, 1), (64, 32, 1, 4, 1, 1)),
        192: ((128, 16, 1, 8, 1, 1), (64, 32, 1, 8, 2, 0), (32, 16, 1, 4, 2, 0)),
        256: ((128, 16, 1, 8, 1, 1), (64, 32, 1, 8, 2, 0), (32, 16, 1, 4, 2, 0)),
    },
    ("backward_portable", 2): {
        64: ((64, 64, 2, 4, 1, 1), (64, 64, 1, 4, 1, 1)),
        128: ((32, 128, 2, 8, 1, 1), (32, 64, 2, 4, 1, 1), (16, 64, 1, 4, 1, 1)),
        192: ((32, 64, 1, 8, 2, 1), (16, 32, 1, 4, 2, 1)),
        256: ((32, 64, 1, 8, 2, 1), (16, 64, 1, 8, 2, 1), (16, 32, 1, 4, 2, 1)),
    },
    ("backward_portable", 4): {
        64: ((32, 64, 2, 4, 1, 2), (32, 128, 1, 8, 1, 1)),
        128: ((16, 64, 2, 4, 1, 2), (16, 128, 1, 8, 1, 1), (16, 64, 1, 4, 1, 1)),
        192: ((16, 64, 1, 8, 2, 1), (16, 32, 1, 8, 4, 1)),
        256: ((16, 64, 1, 8, 2, 1), (16, 32, 1, 8, 4, 1)),
    },
    ("backward_portable_dq", 2): {
        64: ((64, 64, 2, 4, 1, 1), (64, 64, 1, 4, 1, 1)),
        128: ((64, 64, 2, 4, 1, 1), (64, 32, 2, 4, 1, 1), (64, 32, 1, 4, 1, 1)),
        192: ((64, 32, 1, 4, 1, 1), (32, 32, 1, 2, 1, 1), (32, 16, 1, 2, 1, 1)),
        256: ((64, 32, 1, 4, 1, 1), (32, 16, 1, 2, 1, 1)),
    },
    ("backward_portable_dq", 4): {
        64: ((64, 32, 2, 4, 1, 3), (64, 32, 2, 4, 1, 2), (128, 32, 1, 8, 1, 1)),
        128: ((64, 32, 1, 4, 1, 2), (128, 16, 1, 8, 1, 1), (64, 32, 1, 4, 1, 1)),
        192: ((64, 16, 1, 8, 2, 1), (32, 16, 1, 4, 2, 1)),
        256: ((64, 16, 1, 8, 2, 1), (32, 16, 1, 4, 2, 1)),
    },
}
# Tiles of backward_portable where it sums dQ too: multiples of 64 rows. A warp keeps its keys' slices of dK and dV,
# and 32 rows of dQ for one product. With two stages Q comes a step early, and ptxas spills up to 64 bytes, stored and
# loaded (for sm_100 up to 204), of what is needed before and after the steps and one to three words of what a step
# reads once: by 1 to 5% faster all the same.
_SUMS_DQ = {
    64: ((128, 128, 2, 8, 2, 1), (64, 64, 1, 4, 1, 1)),
    128: ((64, 128, 2, 8, 2, 1), (64, 64, 1, 8, 2, 1)),
    256: ((64, 64, 2, 8, 4, 1), (64, 64, 1, 8, 4, 1)),
}
# Where thread blocks share the keys: 16 rows, those of few queries and a group's heads, so the warps share them all.
# What counts is that many bytes are on their way: several thread blocks a multiprocessor, each with one K or V. The
# first that fits twice is taken.
_PARTS = {
    2: {
        64: ((16, 128, 1, 4, 4, 1), (16, 64, 1, 4, 4, 1)),
        128: ((16, 64, 1, 4, 4, 1), (16, 32, 1, 4, 4, 1)),
        256: ((16, 32, 1, 4, 4, 1), (16, 16, 1, 4, 4, 1)),
    },
    4: {
        64: ((16, 64, 1, 4, 4, 3), (16, 32, 1, 4, 4, 3)),
        128: ((16, 32, 1, 4, 4, 3), (16, 16, 1, 4, 4, 3)),
        256: ((16, 16, 1, 4, 4, 3),),
    },
}
FEW_ROWS = 16  # queries times heads of a group, up to which these tiles serve
MOST_PARTS = 128  # a thread of forward_combine each
# With a bias or a mask a tile of it takes shared memory, and the score stage registers, as dropout and several options
# do: in place of those above.
_WITH_DENSE = {
    ("forward_portable", 2, 128): ((64, 64, 2, 4, 1, 1), (64, 32, 2, 4, 1, 1), (64, 32, 1, 4, 1, 1)),
    ("forward_portable", 2, 192): ((128, 32, 1, 8, 1, 1), (64, 32, 1, 8, 2, 1)),
    ("forward_portable", 2, 256): ((64, 32, 1, 8, 2, 1), (32, 32, 1, 4, 2, 1)),
    ("forward_portable", 4, 64): ((128, 32, 2, 8, 1, 1), (64, 32, 2, 4, 1, 1)),
    ("forward_portable", 4, 128): ((128, 16, 2, 8, 1, 0), (64, 32, 1, 4, 1, 0)),
    ("forward_portable", 4, 192): ((64, 16, 1, 8, 2, 1), (32, 16, 1, 4, 2, 1)),
    ("forward_portable", 4, 256): ((32, 16, 1, 8, 4, 1),),
    ("backward_portable", 2, 64): ((64, 64, 2, 4, 1, 1), (32, 64, 1, 4, 1, 1)),
    ("backward_portable", 4, 64): ((16, 64, 2, 4, 1, 1),),
    ("backward_portable", 4, 128): ((16, 64, 2, 8, 2, 1), (16, 64, 1, 8, 2, 1)),
    ("backward_portable", 4, 256): ((16, 32, 1, 8, 4, 1), (16, 16, 1, 4, 4, 1)),
    ("backward_portable_dq", 2, 64): ((64, 32, 2, 4, 1, 1), (64, 32, 1, 4, 1, 1)),
    ("backward_portable_dq", 2, 128): ((64, 32, 2, 4, 1, 1), (64, 32, 1, 4, 1, 1)),
    ("backward_portable_dq", 2, 192): ((64, 32, 1, 8, 2, 1), (32, 32, 1, 4, 2, 1), (32, 16, 1, 8, 4, 1)),
    ("backward_portable_dq", 2, 256): (
        *((64, 32, 1, 8, 2, 1), (32, 32, 1, 4, 2, 1), (32, 16, 1, 4, 2, 1)),
        (32, 16, 1, 8, 4, 1),
    ),
    ("backward_portable_dq", 4, 64): ((64, 16, 2, 4, 1, 1),),
    ("backward_portable_dq", 4, 128): ((64, 16, 2, 8, 2, 1), (64, 16, 1, 8, 2, 1), (32, 16, 1, 8, 4, 1)),
    ("backward_portable_dq", 4, 192): ((32, 16, 1, 8, 4, 1), (16, 16, 1, 4, 4, 1)),
    ("backward_portable_dq", 4, 256): ((32, 16, 1, 8, 4, 1), (16, 16, 1, 8, 8, 1)),
}
# Tiles of the Hopper forward: a producer warpgroup and one for every 64 rows. Its head dimensions are padded to whole
# panels of 64 columns. Registers decide the keys a tile, here by padded head_dim_v, without and with ALiBi: of 240 a
# lane keeps cols / 2 of S, cols / 4 of each of two sets of P and head_dim_v / 2 of O.
_HOPPER_FORWARD_COLS = {
    64: (128, 128),  # 64 + 2 * 32 + 32
    128: (128, 128),  # 64 + 2 * 32 + 64
    192: (112, 96),  # 56 + 2 * 28 + 96
    256: (64, 64),  # 32 + 2 * 16 + 128
}
# Tiles of the Hopper backward as (rows, cols, stages, warps), by kernel and head dimension: a producer warpgroup and
# two that compute. Registers of a lane: in dK and dV together head_dim (wide: head_dim / 2, one of the two a
# warpgroup), rows / 2 each for S and dP, rows / 4 each for P and dS; in dQ head_dim / 2, cols / 2 each for S and dP,
# cols / 4 for dS, and head_dim / 2 for Q and dO where they stay in registers. Several of softcap, ALiBi and dropout
# together, and softcap where a step has 128 rows, leave registers for half the rows of dK and dV, and for no dQ beside
# them. With one of softcap and dropout up to 100 bytes are spilled, mostly of what a tile needs before and after its
# steps: that costs less than dQ by a kernel of its own.
_HOPPER_BACKWARD = {
    "backward_hopper": {64: (128, 128, 2, 12), 128: (64, 128, 2, 12)},
    "backward_hopper_wide": {192: (64, 64, 2, 12), 256: (64, 64, 2, 12)},
    "backward_hopper_dq": {
        64: (128, 128, 2, 12),
        128: (128, 64, 2, 12),
        192: (128, 64, 2, 12),
        256: (128, 64, 2, 12),
    },
}
# Kernels of which there is one tile: tokens with all their heads, the rows of a head in turn, a piece of dQ, an element
# of dbias a thread.
_FIXED = {
    "backward_prepare": Tile(rows=4, cols=1, warps=8),
    "backward_sinks": Tile(rows=1, cols=1, warps=8),
    "backward_finish": Tile(rows=64, cols=64, warps=4),  # rows: those of the kernel that adds to the sum of dQ
    "backward_bias": Tile(rows=1, cols=1, warps=8),
    "forward_combine": Tile(rows=1, cols=MOST_PARTS, warps=MOST_PARTS // 32),
}
PIECE = 64  # rows and columns of a piece of dq_sum
_LIST_WARPS = 32  # of the kernels that list tasks
_DENSE = ("bias", "mask")
_RELEVANT = {  # what the code of a kernel depends on, beside dtype, head_dim, head_dim_v and packed
    "forward_portable": (
        "bounded_left",
        "bounded_right",
        "softcap",
        "alibi",
        "sinks",
        "dropout",
        "allow_tf32",
        "parts",
        *_DENSE,
    ),
    "forward_combine": ("sinks",),
    "forward_hopper": ("bounded_left", "bounded_right", "softcap", "alibi", "sinks", "dropout"),
    "backward_portable": (
        *("bounded_left", "bounded_right", "softcap", "alibi", "dropout", "lean", "allow_tf32"),
        *_DENSE,
    ),
    "backward_portable_dq": (
        *("bounded_left", "bounded_right", "softcap", "alibi", "dropout", "deterministic", "allow_tf32"),
        *_DENSE,
    ),
    "backward_hopper": ("bounded_left", "bounded_right", "softcap", "alibi", "dropout", "deterministic", "lean"),
    "backward_hopper_wide": ("bounded_left", "bounded_right", "alibi", "dropout"),
    "backward_hopper_dq": ("bounded_left", "bounded_right", "softcap", "alibi", "dropout"),
    "forward_list": ("bounded_left", "bounded_right", "softcap", "alibi", "dropout"),
    "backward_list": ("bounded_left", "bounded_right"),
    "backward_prepare": (),
    "backward_finish": (),
    "backward_sinks": ("sinks",),
    "backward_bias": ("bias",),
}


def kernel_spec(kernel: str, spec: Spec) -> Spec:
    """The Spec as far as a kernel's code depends on it, so that calls that differ elsewhere share one compilation."""
    relevant = {name: getattr(spec, name) for name in _RELEVANT[kernel]}
    if kernel == "backward_hopper" and _dq_alone(spec):
        relevant |= {"lean": True, "deterministic": False}  # nothing is atomic then
    if kernel == "backward_portable_dq" and not spec.bias:
        relevant["deterministic"] = False  # it always is
    if kernel == "forward_portable" and spec.parts:
        relevant["sinks"] = False  # forward_combine adds them
    return Spec(dtype=spec.dtype, head_dim=spec.head_dim, head_dim_v=spec.head_dim_v, packed=spec.packed, **relevant)


def check_supported(spec: Spec, path: int) -> None:
    """Raise UnsupportedError for what the portable kernels cannot do on a code path."""
    if spec.dtype == "float64":
        raise UnsupportedError("q: got dtype float64 on a GPU; cast to float32, or pass NumPy arrays")
    if path < 800 and spec.dtype != "float16":
        raise UnsupportedError(f"q: got dtype {spec.dtype} on sm_75, whose tensor cores know float16; cast to float16")
    for name, dim in (("q", spec.head_dim), ("v", spec.head_dim_v)):
        if dim > MAX_HEAD_DIM:
            raise UnsupportedError(f"{name}: got head_dim {dim}; the kernels go to {MAX_HEAD_DIM}: pass NumPy arrays")


def served(spec: Spec, path: int, shared_limit: int | None = None) -> Spec:
    """The Spec of a backward as the portable kernels serve it: lean where they do not sum dQ."""
    lean = replace(spec, lean=True)
    if spec.lean or spec.deterministic or spec.bias or spec.mask or spec.dtype == "float32" or _score_options(spec):
        return lean
    try:
        tile_of("backward_portable", spec, path, 16, shared_limit)
    except UnsupportedError:  # shared memory does not suffice
        return lean
    return spec


def kernels_of(spec: Spec, *, backward: bool, hopper: bool = False) -> tuple[str, ...]:
    """The kernels that one call launches, in order; `hopper` where the Hopper kernels serve it, else `spec` is that of
    `served`."""
    if not backward:
        if spec.parts:
            return ("forward_portable", "forward_combine")
        if not hopper:
            return ("forward_portable",)
        return ("forward_list", "forward_hopper") if spec.packed else ("forward_hopper",)
    first = ("backward_prepare", "backward_sinks") if spec.sinks else ("backward_prepare",)
    if not hopper:
        last = ("backward_bias",) if spec.bias else ()  # where the bias is broadcast
        return (*first, "backward_portable", "backward_portable_dq" if spec.lean else "backward_finish", *last)
    if spec.packed:
        first += ("backward_list",)
    return (*first, _of_keys(spec), "backward_hopper_dq" if _dq_alone(spec) else "backward_finish")


def has_parts(spec: Spec) -> bool:
    """Whether thread blocks can share the keys of a forward, as far as the Spec decides."""
    return not (spec.packed or spec.dropout or spec.bias or spec.mask)


def has_hopper(spec: Spec, *, backward: bool) -> bool:
    """Whether the Hopper kernels serve a call on sm_90a, as far as the Spec decides."""
    dims = (spec.head_dim, spec.head_dim_v)
    if spec.dtype not in ("float16", "bfloat16") or spec.bias or spec.mask:
        return False
    if any(dim % 8 or _whole_panels(dim) not in _HOPPER_FORWARD_COLS for dim in dims):
        return False
    if not backward:
        return True
    panels, panels_v = map(_whole_panels, dims)
    if panels != panels_v:
        return False
    # What registers suffice for.
    if _of_keys(spec) == "backward_hopper_wide" and (spec.softcap or _score_options(spec) > 1):
        return False
    return panels <= 192 or not spec.dropout


def _of_keys(spec: Spec) -> str:
    """The Hopper kernel of dK and dV."""
    wide = _whole_panels(spec.head_dim) in _HOPPER_BACKWARD["backward_hopper_wide"]
    return "backward_hopper_wide" if wide else "backward_hopper"


def _dq_alone(spec: Spec) -> bool:
    """Whether dQ is left to a kernel of its own, which needs no workspace: lean, or where registers do not suffice."""
    ordered_and_long = spec.deterministic and (spec.bounded_left or _score_options(spec) > 0)
    wide = _of_keys(spec) == "backward_hopper_wide"
    return spec.lean or ordered_and_long or wide or _crowded(spec)


def _whole_panels(dim: int) -> int:
    return -(-dim // 64) * 64


def _score_options(spec: Spec) -> int:
    """How many options take registers of the Hopper kernels' score stage."""
    return spec.softcap + spec.alibi + spec.dropout


def _crowded(spec: Spec) -> bool:
    """Whether they leave registers of the Hopper backward for half the rows, and for no dQ."""
    return _score_options(spec) > 1 or (spec.softcap and _whole_panels(spec.head_dim) == 64)


def _long_score_stage(spec: Spec) -> bool:
    return spec.softcap or spec.alibi or spec.dropout or spec.bias or spec.mask


def _hopper_forward_tile(spec: Spec, vector: int) -> Tile:
    """The tile of the Hopper forward: two sets of P where registers allow; the most keys that shared memory takes."""
    narrow = max(spec.head_dim, spec.head_dim_v) <= 64 and not _long_score_stage(spec)
    groups = 3 if narrow else 2  # three of 160 registers each hide more: 64 + 32 + 32
    most = _HOPPER_FORWARD_COLS[_whole_panels(spec.head_dim_v)][spec.alibi]
    unit = 32 if spec.dropout else 16  # keys of a step of O += P V, and with dropout half of a Philox counter's
    for cols in range(most // unit * unit, 0, -unit):
        # Room for the next task's Q too, as far as shared memory allows.
        for q_slots in range(2 * groups, groups - 1, -1):
            tile = Tile(
                rows=64 * groups,
                cols=cols,
                stages=3 if narrow else 2,  # where K is kept until P is known to be in range
                warps=4 + 4 * groups,
                blocks=1,
                vector=vector,
                p_sets=1 if narrow else 2,
                q_slots=q_slots,
                turns=groups == 3,
            )
            for choice in (replace(tile, staged=True), tile):
                if shared_bytes("forward_hopper", spec, choice) <= SHARED_MEMORY[900]:
                    return choice
    raise UnsupportedError(f"no tile of forward_hopper fits: {spec}")


def tile_of(
    kernel: str, spec: Spec, path: int, vector: int, shared_limit: int | None = None, rows: int = FEW_ROWS
) -> Tile:
    """The tile of a kernel on a code path; `vector` is the width of its copies in bytes.

    `shared_limit` is what a thread block of the GPU may have, where that may be less than the path's own GPUs give.
    With spec.parts, `rows` are the queries times the heads of a group.
    """
    if kernel in ("forward_list", "backward_list"):
        listed = tile_of("forward_hopper" if kernel == "forward_list" else _of_keys(spec), spec, path, vector)
        return Tile(rows=listed.rows, cols=listed.cols, warps=_LIST_WARPS)
    if kernel == "forward_hopper":
        return _hopper_forward_tile(spec, vector)
    if kernel in _HOPPER_BACKWARD:
        rows, cols, stages, warps = _HOPPER_BACKWARD[kernel][_whole_panels(spec.head_dim)]
        if kernel == "backward_hopper" and _crowded(spec):
            rows //= 2
        return Tile(rows=rows, cols=cols, stages=stages, warps=warps, blocks=1, vector=vector)
    if kernel in _FIXED:
        return replace(_FIXED[kernel], vector=vector)
    return _portable_tile(kernel, spec, path, vector, shared_limit, spec.parts and rows <= FEW_ROWS)


def tiles_of(
    kernels: tuple[str, ...], spec: Spec, path: int, vector: int, shared_limit: int | None = None, rows: int = FEW_ROWS
) -> dict[str, Tile]:
    """The tiles of the kernels of one call, by name; arguments as for `tile_of`."""
    tiles = {name: tile_of(name, kernel_spec(name, spec), path, vector, shared_limit, rows) for name in kernels}
    if "backward_finish" in tiles:
        adds = next(name for name in ("backward_hopper", "backward_portable") if name in tiles)
        tiles["backward_finish"] = replace(tiles["backward_finish"], rows=tiles[adds].rows)
    return tiles


def _short_forward_tiles(spec: Spec, path: int, reach: int) -> tuple[tuple[int, ...], ...]:
    """The tile of a portable forward of 16-bit types with a short score stage, from sm_80 on, to be taken before those
    of the table.

    32 rows a warp instead of 16 halve the reads of K and V; how many keys find their registers beside them depends on
    what else takes some.
    """
    if path < 800 or reach > 128:
        return ()
    left = spec.bounded_left
    if reach == 64:
        return ((128, 64 if left else 128 if path < 1000 else 112, 1, 4, 1, 1),)
    return ((128, 80 if left and path < 1000 else 64, 1, 4, 1, 1),)


def _portable_tile(kernel: str, spec: Spec, path: int, vector: int, shared_limit: int | None, few_rows: bool) -> Tile:
    """The tile of one of the portable kernels."""
    limit = SHARED_MEMORY.get(path, min(SHARED_MEMORY.values()))
    if shared_limit is not None:
        limit = min(limit, shared_limit)
    candidates = _portable_candidates(kernel, spec, path, few_rows)
    for rows, cols, stages, warps, split, blocks in candidates:
        if stages > 1 and path < 800:
            continue  # without asynchronous copies there is nothing to keep in flight
        tile = Tile(rows=rows, cols=cols, stages=stages, warps=warps, split=split, blocks=blocks, vector=vector)
        together = (2 if cols > candidates[-1][1] else 1) if few_rows else max(blocks, 1)
        block = shared_bytes(kernel, spec, tile)
        if block <= limit and together * (block + RESERVED) <= (shared_limit or limit) + RESERVED:
            return tile
    raise UnsupportedError(f"no tile of {kernel} fits into {limit} bytes of shared memory: {spec}")


def _portable_candidates(kernel: str, spec: Spec, path: int, few_rows: bool) -> tuple[tuple[int, ...], ...]:
    """The tiles of a portable kernel, of which the first that fits is taken."""
    element_bytes = 4 if spec.dtype == "float32" else 2
    sums_dq = kernel == "backward_portable" and not spec.lean
    if sums_dq:
        table = _SUMS_DQ
    elif few_rows:
        table = _PARTS[element_bytes]
    else:
        table = _PORTABLE[kernel, element_bytes]
    reach = next(dim for dim in table if max(spec.head_dim, spec.head_dim_v) <= dim)
    candidates: tuple[tuple[int, ...], ...] = table[reach]
    if sums_dq:
        return candidates[-1:] if spec.packed else candidates  # where a sequence lies takes registers
    if spec.parts and not few_rows and element_bytes == 4 and reach <= 128:
        # Which head a row is of takes registers.
        candidates = ((64, 32, 2, 4, 1, 1),) if reach == 64 else ((128, 32, 2, 8, 1, 1), (64, 32, 1, 4, 1, 1))
    dense = spec.bias or spec.mask
    if not few_rows and (dense or spec.dropout or _score_options(spec) > 1):
        candidates = _WITH_DENSE.get((kernel, element_bytes, reach), candidates)
        if dense and spec.deterministic:  # the loop over all that is summed in order takes registers too
            candidates = candidates[-1:]
    if kernel == "forward_portable" and element_bytes == 2 and not _long_score_stage(spec) and not spec.parts:
        candidates = (*_short_forward_tiles(spec, path, reach), *candidates)
    return candidates


def shared_bytes(kernel: str, spec: Spec, tile: Tile) -> int:
    """Dynamic shared memory of a kernel, in bytes: the sums at the top of its source."""
    element_bytes = 4 if spec.dtype == "float32" else 2
    dim, dim_v = _whole_panels(spec.head_dim), _whole_panels(spec.head_dim_v)  # of the Hopper kernels
    if kernel == "forward_hopper":  # two barriers and a task for each slot of Q, four barriers a stage
        tiles = tile.q_slots * 64 * dim + tile.stages * tile.cols * (dim + dim_v)
        if tile.staged:
            tiles += tile.rows * dim_v
        if spec.packed:  # longer tasks, and the number of the next
            return tiles * element_bytes + 48 * tile.q_slots + 32 * tile.stages + 32
        return tiles * element_bytes + 32 * tile.q_slots + 32 * tile.stages
    if kernel == "backward_hopper_dq":  # Q and dO; one stage of V where the head is wide
        v_stages = 1 if dim > 128 else tile.stages
        tiles = tile.rows * (dim + dim_v) + tile.cols * (tile.stages * dim + v_stages * dim_v)
        return tiles * element_bytes + 16 + 32 * tile.stages
    if kernel in ("backward_hopper", "backward_hopper_wide"):  # LSE and D in 16 bytes a row
        tiles = (tile.cols + tile.stages * tile.rows) * (dim + dim_v)
        if kernel == "backward_hopper_wide":  # P in two slots
            exchanged = 2 * tile.rows * tile.cols * element_bytes
        elif spec.lean:
            exchanged = 0
        else:  # dS in a ring, and dQ in float32, one piece a warpgroup and slot
            dq_slots = 2 if spec.deterministic and tile.rows == 64 else 1
            ds_slots = 3 if tile.rows == 64 and dq_slots == 1 else 2
            exchanged = ds_slots * tile.rows * tile.cols * element_bytes + dq_slots * 2 * 64 * 64 * 4
        return tiles * element_bytes + exchanged + tile.stages * tile.rows * 16 + 96 + 32 * tile.stages

    def pitch(dim: int) -> int:  # row_pitch of cuda_src/product.cuh
        step = 16 * tile.split
        return -(-dim // step) * step * element_bytes + 16

    dense = 4 * tile.rows * (tile.cols + 4) if spec.bias or spec.mask else 0  # DENSE_BYTES of cuda_src/dense.cuh
    q_row, kv_row = pitch(spec.head_dim), pitch(spec.head_dim) + pitch(spec.head_dim_v)
    if kernel == "forward_portable":
        return tile.rows * q_row + tile.stages * tile.cols * kv_row + dense
    if kernel == "backward_portable":
        # A row of Q and LSE, of dO and D; where dQ is summed dS too, and P if warps exchange it.
        staged, staged_v = q_row + 4, pitch(spec.head_dim_v) + 4
        if spec.lean:
            return tile.cols * kv_row + tile.stages * tile.rows * (staged + staged_v) + dense
        scores = tile.cols * (tile.rows * element_bytes + 16) * min(tile.split, 2)
        return tile.cols * kv_row + tile.rows * (tile.stages * staged + staged_v) + scores
    if kernel == "backward_portable_dq":
        return tile.rows * kv_row + tile.stages * tile.cols * kv_row + dense * (2 if tile.split > 1 else 1)
    return 0
