"""The kernels of the GPU tests, compiled in parallel before the first of them."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest

from cuflash.spec import Spec

if TYPE_CHECKING:
    from cuflash.cuda.precompile import Job

_MASKS = ({}, {"bounded_right": True}, {"bounded_left": True, "bounded_right": True})


def _specs() -> list[Spec]:
    """What most tests need; a few compile a kernel of their own."""

    def spec(dtype: str, dim: int, **options: bool) -> Spec:
        return Spec(dtype=dtype, head_dim=dim, head_dim_v=dim, **options)

    return [
        *(spec("float16", dim, **mask) for dim, mask in product((64, 128, 192, 256), _MASKS)),
        *(spec("float16", dim, bounded_right=True, dropout=True) for dim in (64, 128, 256)),
        *(spec("bfloat16", dim, **mask) for dim, mask in product((64, 128, 256), _MASKS[:2])),
        *(spec("float32", 64, allow_tf32=tf32) for tf32 in (False, True)),
        spec("float16", 136),
    ]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    from tests.gpu.compilation import compile_first

    compile_first(jobs_of_tests())


def jobs_of_tests() -> list[Job]:
    """The kernels of most tests in this folder on the first device."""
    from cuflash.cuda import toolchain
    from tests.gpu.compilation import usual_jobs

    target = toolchain.device_target(0)
    return [job for spec in _specs() for job in usual_jobs(spec, target)]
