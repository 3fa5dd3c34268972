"""Settings of every test run: threads, which tests need a GPU, and how hypothesis draws its examples."""

from __future__ import annotations

import os
import time
from typing import Any

# The suite multiplies many small matrices. On a busy machine BLAS threads that wait for each other made it three times
# slower; this must be said before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's

import pytest
from hypothesis import settings

from tests.gpu import record

# The same examples on every run, on slow and on fast machines: a failure is a finding, never a draw of the dice.
settings.register_profile("cuflash", derandomize=True, deadline=None, database=None)
settings.load_profile("cuflash")


@pytest.fixture
def cp() -> Any:
    """CuPy, in tests on a GPU."""
    import cupy

    return cupy


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked `gpu` unless the `-m` expression speaks of them."""
    if "gpu" in (config.getoption("-m") or ""):
        return
    gpu = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("gpu_adapter")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in set(gpu)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile-for", metavar="ARCH", help="run nothing: compile what the GPU tests asked for need on such a GPU"
    )


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--compile-for` the kernels go into the user's cache, and no test runs."""
    arch = session.config.getoption("--compile-for")
    if arch is None:
        return None
    from cuflash.cuda import toolchain
    from tests.contract.conftest import jobs_of_cases
    from tests.gpu.compilation import compile_first
    from tests.gpu.conftest import jobs_of_tests

    path = toolchain.Target.named(arch).path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "capability", lambda device: (path // 100, path // 10 % 10))
        jobs = [*jobs_of_cases(session.items), *jobs_of_tests()]
    compile_first(jobs)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After the whole GPU suite, record it; after any other run, say when the record is out of date."""
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    if config.getoption("-m") == "gpu" and not config.getoption("-k") and config.args == config.getini("testpaths"):
        if counts["passed"]:
            seconds = time.time() - terminalreporter._session_start.time
            record.write(counts["passed"], counts["failed"] + counts["error"], counts["skipped"], seconds)
            terminalreporter.write_line(f"wrote {record.RECORD}")
    elif reason := record.staleness():
        terminalreporter.write_line(f"note: {reason}; run `python -m pytest -m gpu` on a GPU")
