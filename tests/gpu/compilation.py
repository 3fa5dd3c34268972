"""The kernels of GPU tests, compiled in parallel before the tests: beside them they would take the tests' time."""

from __future__ import annotations

from collections.abc import Iterable

from cuflash import tuning
from cuflash.cuda.precompile import WAYS, Job, jobs_of, precompile
from cuflash.cuda.toolchain import Target
from cuflash.spec import Spec

SPILLS = 224  # bytes stored and loaded, where the tile table says so


def allowed_spills(job: Job) -> int:
    """How many bytes a kernel may spill: none, but where the tile table says why."""
    name, spec, tile, *_ = job
    if name in ("backward_hopper", "backward_hopper_dq"):
        return SPILLS * (spec.softcap or spec.dropout)
    if spec.dtype == "float32":
        return SPILLS * name.startswith(("forward_portable", "backward_portable"))
    return SPILLS * (name == "backward_portable" and not spec.lean and tile.stages > 1)


def usual_jobs(
    spec: Spec,
    target: Target,
    ways: Iterable[dict[str, bool]] = WAYS,
    vector: int = 16,
    few_queries: bool = False,
) -> list[Job]:
    """The kernels of calls whose arrays lie as all kernels take them: the portable ones only where no others serve, and
    those of few queries over many keys only if asked for."""
    hopper = target == Target.named("sm_90a")
    replaced = [
        f"{direction}_portable"
        for direction, backward in (("forward", False), ("backward", True))
        if hopper and tuning.has_hopper(spec, backward=backward)
    ]

    def is_usual(job: Job) -> bool:
        if job[0] == "forward_combine" or job[1].parts:
            return few_queries
        return not job[0].startswith(tuple(replaced))

    return [job for job in jobs_of(spec, target, vector, ways) if is_usual(job)]


def compile_first(jobs: Iterable[Job]) -> None:
    """Compile what the cache lacks, and raise what does not compile."""
    report = precompile(jobs)
    if report.failed:
        raise RuntimeError("\n".join(f"{job}: {reason}" for job, reason in report.failed))
