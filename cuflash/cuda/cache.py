"""Cubins on disk, found by their content's key. One rule of names serves the user's cache and a folder carried along.

A file is `<key>-<NVRTC version>.cubin`, key = sha256 of the source and the machine-independent options (which name the
architecture). The cache takes only what the installed NVRTC made. The precompiled folder takes any version, since a
machine without NVRTC cannot ask for one; so a copy of a cache folder is a precompiled folder.

A file ends in the sha256 of what stands before it, so a damaged one is noticed and made again. Tools that read an
ELF file do not mind the trailer.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("cuflash")

_DIGEST_BYTES = hashlib.sha256().digest_size
_TOUCH_SECONDS = 24 * 3600  # a file's time of last use is kept to the day: hardly a write, and enough to evict by


def key(source: str, options: tuple[str, ...]) -> str:
    """The name of what compiling this source with these options gives."""
    return hashlib.sha256("\0".join((source, *options)).encode()).hexdigest()


def user_folder() -> Path:
    """`CUFLASH_CACHE_DIR`, or `cuflash` in the user's cache folder. An OSError where there is no home."""
    if chosen := os.environ.get("CUFLASH_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base, "cuflash")
    try:
        return Path.home() / ".cache" / "cuflash"
    except RuntimeError as error:
        raise FileNotFoundError("there is no home folder; CUFLASH_CACHE_DIR chooses another") from error


def user_limit() -> int:
    """The bytes the user's cache may hold: `CUFLASH_CACHE_MAX_MB`, by default 512 MB."""
    text = os.environ.get("CUFLASH_CACHE_MAX_MB") or "512"
    if not text.isdecimal():
        raise ValueError(f"CUFLASH_CACHE_MAX_MB is {text!r}; allowed are whole numbers of megabytes, 0 to keep nothing")
    return int(text) * 1_000_000


def precompiled(key: str) -> bytes | None:
    """The cubin of this key in the folder `CUFLASH_PRECOMPILED`, if that is set and has it."""
    folder = os.environ.get("CUFLASH_PRECOMPILED")
    return load(Path(folder), key, None) if folder else None


def find(key: str, version: str) -> bytes | None:
    """The cubin of this key in the user's cache, made by this version of NVRTC."""
    try:
        return load(user_folder(), key, version)
    except OSError:
        return None


def keep(key: str, version: str, cubin: bytes) -> None:
    """Put a cubin into the user's cache and hold the cache to its limit; a warning, once, where that cannot be."""
    limit = user_limit()
    if limit == 0:
        return
    try:
        folder = user_folder()
        store(folder, key, version, cubin)
        trim(folder, limit)
    except OSError as error:
        _warn_unwritable(f"{error.strerror or error}")


def load(folder: Path, key: str, version: str | None) -> bytes | None:
    """The cubin of this key made by NVRTC `version` (None: by any); None where there is no sound file."""
    for path in [folder / _name(key, version)] if version else sorted(folder.glob(_name(key, "*")), reverse=True):
        cubin = _read(path)
        if cubin is not None:
            return cubin
    return None


def store(folder: Path, key: str, version: str, cubin: bytes) -> None:
    """Write one file so that a reader sees all of it or nothing. An OSError where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(key, version)
    unfinished = folder / f"{path.stem}-{uuid.uuid4().hex}.tmp"
    try:
        unfinished.write_bytes(cubin + hashlib.sha256(cubin).digest())
        try:
            os.replace(unfinished, path)
        except PermissionError:
            # Windows does not replace a file that another process has open: that one holds the same cubin.
            if _read(path) is None:
                raise
    finally:
        unfinished.unlink(missing_ok=True)


def trim(folder: Path, limit: int) -> None:
    """Remove the files used longest ago until `limit` bytes are left, unfinished ones of dead processes included."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".cubin", ".tmp")):
                with suppress(OSError):  # another process removed it
                    status = entry.stat()
                    files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with suppress(OSError):  # removed already, or open elsewhere on Windows
            os.unlink(path)
        total -= size


@functools.cache
def _warn_unwritable(reason: str) -> None:
    """Say once a reason that kernels are not kept on disk."""
    logger.warning("compiled kernels are kept in memory only, the cache cannot be written: %s", reason)


def _name(key: str, version: str) -> str:
    return f"{key}-{version}.cubin"


def _read(path: Path) -> bytes | None:
    """The cubin in one file, its time of use refreshed; None where there is no sound file."""
    try:
        data = path.read_bytes()
        used = path.stat().st_mtime
    except OSError:
        return None
    cubin, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not cubin or hashlib.sha256(cubin).digest() != digest:
        logger.debug("%s is damaged and is made again", path)
        return None
    if time.time() - used > _TOUCH_SECONDS:
        with suppress(OSError):  # a read-only folder
            os.utime(path)
    return cubin
