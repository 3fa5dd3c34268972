"""tests/gpu_record.json: on which GPU the suite last passed, and for which kernels."""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "gpu_record.json"


def kernels_hash() -> str:
    """sha256 over names and contents of everything under cuda_src and cuflash/cuda."""
    digest = hashlib.sha256()
    for folder in ("cuda_src", "cuflash/cuda"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cu", ".cuh", ".py"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write(passed: int, failed: int, skipped: int, seconds: float) -> None:
    """Record one run of the whole GPU suite on the current device."""
    import cupy

    from cuflash.cuda import toolchain

    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    record = {
        "gpu": device["name"].decode(),
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": toolchain.toolchain().version,
        "cupy": cupy.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "kernels_sha256": kernels_hash(),
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(seconds, 1),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def staleness() -> str | None:
    """Why the record says nothing about the kernels as they are now; None when it does."""
    if not RECORD.exists():
        return "there is no tests/gpu_record.json: the GPU suite has not been recorded"
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["kernels_sha256"] != kernels_hash():
        return f"cuda_src or cuflash/cuda changed since tests/gpu_record.json was written on {record['date']}"
    return None
