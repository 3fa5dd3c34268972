"""Kernels at run time: cuda_src/<kernel>.cu and one Spec -> source text -> cubin, cached -> loaded function.

Environment: `CUFLASH_CACHE_DIR` and `CUFLASH_CACHE_MAX_MB` (the cache), `CUFLASH_PRECOMPILED` (a read-only folder that
`cuflash compile --output` filled, looked into first), `CUFLASH_DUMP` (a folder for the exact source and log of every
kernel; all are then compiled afresh), `CUFLASH_FORCE_ARCH` (an older architecture's code path).
"""

from __future__ import annotations

import functools
import importlib.resources
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuflash.cuda import cache
from cuflash.cuda.toolchain import (
    CompileResult,
    KernelCompileError,
    Target,
    compile_cubin,
    import_cupy,
    options,
    toolchain,
)
from cuflash.spec import Spec, Tile

if TYPE_CHECKING:
    from importlib.abc import Traversable

logger = logging.getLogger("cuflash")

_VARIANT = '#include "variant.cuh"'  # where a kernel's constants go; there is no such file
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"\s*(//.*)?$')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def source(kernel: str, spec: Spec, tile: Tile, flat: str = "") -> str:
    """The complete text that is compiled: its own headers in place, SPEC and TILE where it includes variant.cuh.

    `flat` is another entry, of cuflash.cuda.flat, which takes the place of the kernel's own.
    """
    before, after = _flattened(_source_folder(), kernel)
    text = f'{before}#line 1 "variant.cuh"\n{spec.render()}{tile.render()}{after}'
    return f'#define CUFLASH_FLAT\n{text}#line 1 "flat.cu"\n{flat}' if flat else text


def _source_folder() -> Traversable:
    """Where the CUDA sources lie: a folder of the installed package, or of the repository when it is editable."""
    return importlib.resources.files("cuflash.cuda_src")


@functools.cache
def _flattened(folder: Traversable, kernel: str) -> tuple[str, str]:
    """The text of a kernel with its own headers in place, before and after its constants."""
    known = sorted(item.name.removesuffix(".cu") for item in folder.iterdir() if item.name.endswith(".cu"))
    if kernel not in known:
        raise ValueError(f"kernel is {kernel!r}; the sources are {', '.join(known) or 'missing'}")
    lines = _flatten(folder, f"{kernel}.cu", set())
    if lines.count(_VARIANT) != 1:
        raise ValueError(f"{kernel}.cu has {lines.count(_VARIANT)} lines {_VARIANT}; it needs one")
    at = lines.index(_VARIANT)
    return "\n".join(lines[:at]) + "\n", "\n".join(lines[at + 1 :]) + "\n"


def _flatten(folder: Traversable, name: str, seen: set[str]) -> list[str]:
    """The lines of one file, each own header once and at its first place; `#line` keeps messages at the right file."""
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(folder.joinpath(name).read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include and include[1] == "variant.cuh":
            lines += [_VARIANT, f'#line {number + 1} "{name}"']
        elif include and include[1] not in seen:
            seen.add(include[1])
            if not folder.joinpath(include[1]).is_file():
                raise FileNotFoundError(f"{name}, line {number}, includes {include[1]!r}, which is not in {folder}")
            lines += [*_flatten(folder, include[1], seen), f'#line {number + 1} "{name}"']
        elif include or _PRAGMA_ONCE.match(line):
            lines.append("")
        else:
            lines.append(line)
    return lines


def compile_variant(kernel: str, spec: Spec, tile: Tile, target: Target, flat: str = "") -> CompileResult:
    """Compile one kernel afresh, past every cache: its cubin and log. `flat` as for `source`.

    Raises KernelCompileError, with the source written to a file, or UnsupportedError without a fitting toolchain.
    """
    text = source(kernel, spec, tile, flat)
    dump = os.environ.get("CUFLASH_DUMP")
    start = time.perf_counter()
    try:
        result = compile_cubin(text, target, name=f"{kernel}.cu")
    except KernelCompileError as error:
        path = _keep_rejected(dump, kernel, text, target, str(error))
        raise KernelCompileError(
            f"kernel {kernel} does not compile\n  {spec}\n  {tile}\n  {target}\n  source: {path}\n{error}"
        ) from None
    milliseconds = 1e3 * (time.perf_counter() - start)
    logger.debug("compiled %s in %.0f ms: %s %s %s", kernel, milliseconds, spec, tile, target)
    if dump:
        _write_source(Path(dump), kernel, text, target, result.log)
    return result


def _keep_rejected(dump: str | None, kernel: str, text: str, target: Target, log: str) -> Path:
    """Write a source that does not compile where it can be found: the dump folder, the cache, else a temporary one."""
    try:
        return _write_source(Path(dump) if dump else cache.user_folder() / "rejected", kernel, text, target, log)
    except OSError:
        return _write_source(Path(tempfile.mkdtemp(prefix="cuflash-")), kernel, text, target, log)


def _write_source(folder: Path, kernel: str, text: str, target: Target, log: str) -> Path:
    """Write a source as it was compiled, and beside it the options and the log; the source's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kernel}-{cache.key(text, options(target))[:16]}.cu"
    path.write_text(text, encoding="utf-8", newline="\n")
    command = " ".join((f"NVRTC {toolchain().version}", *options(target)))
    path.with_suffix(".log").write_text(f"{command}\n{log}\n", encoding="utf-8", newline="\n")
    return path


def kernel(name: str, spec: Spec, tile: Tile, target: Target, entry: str | None = None) -> Any:
    """The `cupy.cuda.function.Function` of one kernel on the current device; `entry` is its C name, by default `name`.

    A variant is compiled once a process and loaded once a device, however many threads ask. The function has `.ptr` for
    the driver and can be called as `function(grid, block, arguments, shared_bytes, stream)`.

    Raises KernelCompileError or UnsupportedError.
    """

    def load() -> Any:
        return _load(cubin(name, spec, tile, target), entry or name)

    return _FUNCTIONS.get((name, spec, tile, target, entry, _current_device()), load)


def cubin(name: str, spec: Spec, tile: Tile, target: Target, flat: str = "") -> bytes:
    """The cubin of one variant, made once a process: who asks while it is made waits for it. Needs no GPU.

    `flat` as for `source`.
    """
    return _CUBINS.get((name, spec, tile, target, flat), lambda: _cubin(name, spec, tile, target, flat))


def _cubin(kernel: str, spec: Spec, tile: Tile, target: Target, flat: str = "") -> bytes:
    """The cubin of one variant: precompiled, from the cache, or compiled now and kept there."""
    key = cache.key(source(kernel, spec, tile, flat), options(target))
    if not os.environ.get("CUFLASH_DUMP"):
        cubin = cache.precompiled(key) or cache.find(key, toolchain().version)
        if cubin:
            return cubin
    cubin = compile_variant(kernel, spec, tile, target, flat).cubin
    cache.keep(key, toolchain().version, cubin)
    return cubin


def _current_device() -> int:
    return import_cupy().cuda.runtime.getDevice()


def _load(cubin: bytes, entry: str) -> Any:
    """Load a cubin on the current device. The function keeps its module loaded."""
    module = import_cupy().cuda.function.Module()
    module.load(cubin)
    return module.get_function(entry)


class _Once:
    """Values that are made once a key, however many threads ask for them at once; a failure is not kept."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._locks: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        try:
            return self._values[key]
        except KeyError:
            pass
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._values:
                self._values[key] = make()
            return self._values[key]


_CUBINS = _Once()
_FUNCTIONS = _Once()
