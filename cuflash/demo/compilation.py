"""`cuflash compile`: kernels made ahead of time, also for a GPU that is not here or a machine without a compiler."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cuflash
from cuflash.cuda.precompile import Job, jobs_of, precompile
from cuflash.cuda.toolchain import ARCHS, Target, capability_target
from cuflash.demo.driver import driver
from cuflash.demo.progress import progress
from cuflash.errors import UnsupportedError
from cuflash.spec import Spec

DTYPES = ("float16", "bfloat16", "float32")


class Option(NamedTuple):
    """An option that kernels are compiled for."""

    argument: str  # of flash_attention
    fields: tuple[str, ...]  # of Spec that it sets


# A window bounds both sides: as a causal one does, and one with numbers for left and right.
OPTIONS = {
    "window": Option("window_size", ("bounded_left", "bounded_right")),
    "softcap": Option("softcap", ("softcap",)),
    "alibi": Option("alibi_slopes", ("alibi",)),
    "sinks": Option("sinks", ("sinks",)),
    "packed": Option("cu_seqlens_q and cu_seqlens_k", ("packed",)),
    "dropout": Option("dropout_p", ("dropout",)),
    "allow-tf32": Option("allow_tf32", ("allow_tf32",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for; every combination is compiled, forward and backward, causal and not."""

    archs: tuple[str, ...] = ()  # names of `ARCHS`; none: the GPUs of this machine
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    head_dims: tuple[tuple[int, int], ...] = ((64, 64), (128, 128))  # (head_dim, head_dim_v)
    options: tuple[str, ...] = ()  # of OPTIONS: without and with each
    output: str | None = None  # folder; None is the user's cache
    workers: int | None = None  # None: one a core


def run(settings: Settings) -> int:
    """Compile and say what came of it: 0, or 1 where nothing was left to compile or a kernel failed.

    Raises UnsupportedError without a toolchain, or without a GPU where no architecture is named; OSError for a folder
    that cannot be written.
    """
    targets = _targets(settings.archs)
    combinations = itertools.product(targets, settings.dtypes, settings.head_dims)
    jobs = list(dict.fromkeys(job for named in combinations for job in _jobs(*named, settings.options)))
    if not jobs:
        print("nothing to compile: no combination is supported", file=sys.stderr)
        return 1
    where = settings.output if settings.output is not None else "the kernel cache"
    architectures = ", ".join(dict.fromkeys(target.arch for target in targets))
    print(f"{_kernels(len(jobs))} for {architectures} into {where}", flush=True)
    finished = 0
    output = None if settings.output is None else Path(settings.output)
    try:
        with progress(len(jobs), "compiling") as show:

            def count(done: int, _: int, job: Job) -> None:
                nonlocal finished
                finished = done
                show(done, _label(job))

            result = precompile(jobs, output, settings.workers, count)
    except KeyboardInterrupt:
        print(f"interrupted after {finished} of {_kernels(len(jobs))}, which stay", file=sys.stderr)
        raise
    for reason, number in Counter(reason for _, reason in result.failed).items():
        print(f"failed: {_kernels(number)}: {reason}", file=sys.stderr)
    present = f", {result.present} were there already" if result.present else ""
    failed = f", {len(result.failed)} failed" if result.failed else ""
    print(f"compiled {_kernels(result.compiled)} in {result.seconds:.1f} s{present}{failed}")
    if settings.output is not None and len(result.failed) < len(jobs):
        print(f"CUFLASH_PRECOMPILED={settings.output} makes cuflash {cuflash.__version__} use them, without a compiler")
    return 1 if result.failed else 0


def _targets(archs: tuple[str, ...]) -> list[Target]:
    """The named architectures, else those of the GPUs here."""
    if archs:
        return [Target.named(arch) for arch in dict.fromkeys(archs)]
    found = driver()
    if found is None:
        raise UnsupportedError(f"there is no GPU here to compile for: name one with --arch, of {', '.join(ARCHS)}")
    return list(dict.fromkeys(capability_target(gpu.capability) for gpu in found.gpus))


def _jobs(target: Target, dtype: str, dims: tuple[int, int], options: tuple[str, ...]) -> Iterator[Job]:
    """The jobs of every Spec; none, and a message, for what the architecture cannot do."""
    try:
        for spec in _specs(dtype, dims, options):
            yield from jobs_of(spec, target, _vector(spec))
    except UnsupportedError as error:
        print(f"skipped {dtype} of head_dim {_dims(dims)} for {target.arch}: {error}", file=sys.stderr)


def _specs(dtype: str, dims: tuple[int, int], options: tuple[str, ...]) -> Iterator[Spec]:
    """Causal and not, with every subset of the options."""
    for given, causal in itertools.product(itertools.product((False, True), repeat=len(options)), (False, True)):
        subset = itertools.compress(options, given)
        fields = {field: True for option in subset for field in OPTIONS[option].fields}
        fields["bounded_right"] = causal or fields.get("bounded_right", False)
        yield Spec(dtype=dtype, head_dim=dims[0], head_dim_v=dims[1], **fields)


def _vector(spec: Spec) -> int:
    """The width in bytes of the copies that contiguous arrays allow, as cuflash.cuda.launch chooses it."""
    element_bytes = 4 if spec.dtype == "float32" else 2
    aligned = all(dim * element_bytes % 16 == 0 for dim in (spec.head_dim, spec.head_dim_v))
    return 16 if aligned else element_bytes


def _label(job: Job) -> str:
    name, spec, _, target = job
    return f"{name} {target.arch} {spec.dtype} {_dims((spec.head_dim, spec.head_dim_v))}"


def _dims(dims: tuple[int, int]) -> str:
    return str(dims[0]) if dims[0] == dims[1] else f"{dims[0]}:{dims[1]}"


def _kernels(number: int) -> str:
    return "1 kernel" if number == 1 else f"{number} kernels"
