"""The kernels of the GPU tests, compiled in parallel from before the first of them on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from cuflash.spec import Spec

_MASKS = ({}, {"bounded_right": True}, {"bounded_left": True, "bounded_right": True})


@pytest.fixture(scope="session", autouse=True)
def compiled() -> Iterator[None]:
    """What most tests need; a few compile a kernel of their own."""
    from cuflash.cuda import toolchain
    from cuflash.cuda.precompile import jobs_of
    from tests.gpu.compilation import in_background

    specs = [Spec(dtype="float16", head_dim=d, head_dim_v=d, **m) for d, m in product((64, 128, 256), _MASKS)]
    specs += [Spec(dtype="bfloat16", head_dim=d, head_dim_v=d, bounded_right=True) for d in (64, 128)]
    target = toolchain.device_target(0)
    pool = in_background(job for spec in specs for job in jobs_of(spec, target) if "portable" not in job[0])
    yield
    pool.shutdown(cancel_futures=True)
