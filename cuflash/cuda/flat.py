"""Flat entries of the kernels, for callers that pass pointers and numbers one by one, as XLA does.

A kernel's own entry takes struct Params by value, pointers among its fields. A flat entry takes tensor maps and
pointers, those of the arrays that the kernel reads before those that it writes, and then the other fields of Params. It
is rendered behind the kernel's source (`jit.source`), puts Params together and calls the kernel, which is a function
there; the compiler sees through the struct, so the kernel reads its parameters as ever.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from cuflash.cuda.launch import COMMON_PARAMS, DENSE, OPERANDS, PARAMS, TENSORS, WORKSPACE, Step

_FORWARD = ("q", "k", "v", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "bias", "mask")
_BACKWARD = ("q", "k", "v", "dout", "lse", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "bias", "mask", "delta")
# The arrays that a kernel reads, and those that it writes, as far as a call has them. One in both is changed in place.
_ACCESS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forward_portable": (_FORWARD, ("out", "lse")),
    "forward_combine": (("sinks", "partial"), ("out", "lse")),
    "forward_list": (("cu_seqlens_q", "cu_seqlens_k"), ("tickets", "tasks")),
    "forward_hopper": ((*_FORWARD, "tickets", "tasks"), ("out", "lse", "tickets")),
    "backward_prepare": (("out", "dout", "dlse"), ("delta", "tickets")),
    "backward_sinks": (("lse", "sinks", "cu_seqlens_q", "cu_seqlens_k", "delta"), ("dsinks",)),
    "backward_portable": (_BACKWARD, ("dk", "dv", "dq_sum")),
    "backward_portable_dq": (_BACKWARD, ("dq", "dbias", "dbias_sum")),  # one of the last two
    "backward_list": (("cu_seqlens_q", "cu_seqlens_k"), ("tasks",)),
    "backward_hopper": ((*_BACKWARD, "tickets", "tasks"), ("dk", "dv", "tickets", "dq_sum", "dq_turns")),
    "backward_hopper_wide": ((*_BACKWARD, "tickets", "tasks"), ("dk", "dv", "tickets")),
    "backward_hopper_dq": (_BACKWARD, ("dq",)),
    "backward_finish": (("cu_seqlens_q", "cu_seqlens_k", "dq_sum"), ("dq",)),
    "backward_bias": (("dbias_sum",), ("dbias",)),
}
_OF_PARTS = (_FORWARD, ("partial",))  # forward_portable, where thread blocks share the keys
_POINTERS = {"lse": "float*", "dlse": "float*", "delta": "float*", "dq_sum": "float*", "dq_turns": "int*"}
_POINTERS |= {"partial": "float*", "tickets": "int*", "tasks": "int*", "dbias_sum": "float*"}  # the others are void*
_NUMBERS = {"q": "long long", "Q": "unsigned long long", "i": "int", "I": "unsigned int", "f": "float"}
# The fields of Params that are numbers, and their codes: without and with those of a bias and a mask.
NUMBERS = tuple((name, code) for name, code in COMMON_PARAMS if code != "P")
DENSE_NUMBERS = tuple((name, code) for name, code in PARAMS if code != "P")


class Flat(NamedTuple):
    """A flat entry: its text, its C name, and the arrays it takes, in the order of its arguments."""

    text: str
    entry: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]  # after those; one of `reads` again where the kernel changes it in place
    maps: dict[str, int]  # the arrays that are passed as tensor maps instead of pointers, and the rows of a copy
    numbers: tuple[tuple[str, str], ...]  # last: the fields of Params that are numbers, and their codes


def flat(step: Step, arrays: Collection[str]) -> Flat:
    """The flat entry of one launch of a call that has these arrays, by their names in OPERANDS and WORKSPACE."""
    reads, writes = (
        tuple(name for name in (*OPERANDS, *WORKSPACE) if name in names and name in arrays)
        for names in (_OF_PARTS if step.spec.parts else _ACCESS[step.kernel])
    )
    if "dbias_sum" in writes:
        writes = tuple(name for name in writes if name != "dbias")
    maps = dict(step.maps)
    if step.kernel == "forward_hopper" and not step.tile.staged:
        del maps["out"]  # written through its pointer; the map is never used
    parameters, fields = [], []
    for name in (*(name for name in reads if name not in writes), *writes):
        if name in maps:
            continue
        fields.append(f"p.{name}.data = {name};" if _has_strides(name) else f"p.{name} = {name};")
    for name in reads:
        changed = "_before" if name in writes else ""  # the same address as among the writes
        parameters.append(_parameter(name, maps) + changed)
    parameters += [_parameter(name, maps) for name in writes]
    numbers = DENSE_NUMBERS if step.spec.bias or step.spec.mask else NUMBERS
    for name, code in numbers:
        argument = name.replace(".", "_")
        parameters.append(f"{_NUMBERS[code]} {argument}")
        fields.append(f"p.{name} = {argument};")
    passed = ["p", *(f"{name if name in maps else next(iter(maps))}_map" for name, _ in step.maps)]
    entry = f"cuflash_{step.kernel}"
    text = (
        f'extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)\n    {entry}('
        + ",\n        ".join(parameters)
        + ") {\n    Params p{};\n    "
        + "\n    ".join(fields)
        + f"\n    {step.kernel}({', '.join(passed)});\n}}\n"
    )
    return Flat(text, entry, reads, writes, maps, numbers)


def _has_strides(name: str) -> bool:
    return name in (*TENSORS, "lse", "dlse", "delta", *DENSE)


def _parameter(name: str, maps: Collection[str]) -> str:
    if name in maps:
        return f"const __grid_constant__ TensorMap {name}_map"
    return f"{_POINTERS.get(name, 'void*')} {name}"
