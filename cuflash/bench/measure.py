"""Measuring one problem: the contestants that can do it, verified, and then the quantity of its table."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cuflash.bench import verify
from cuflash.bench.contestant import Contestant, Inputs
from cuflash.bench.device import Cpu, Gpu
from cuflash.bench.peers import OURS, Peer
from cuflash.bench.results import OUT_OF_MEMORY, WRONG
from cuflash.bench.verify import WrongResult
from cuflash.bench.workloads import Table, Workload

PATIENCE = 10.0  # seconds that the calls of a peer on one problem may be foreseen to take
SLOW = 0.5  # seconds of a call that is not repeated to warm up
BUDGET = 1.5  # seconds for the rounds of one problem, an equal share for each contestant; at least one round
_HOST_CALLS, _HOST_ROUNDS, _HOST_WARM_UP = 50, 15, 2  # calls: few enough that no queue of launches fills

# The first forward and backward of a process, the device being ready before.
_START = """
import sys, time
import numpy as np
if sys.argv[1] == "gpu":
    import cupy as xp
else:
    xp = np
x = xp.asarray(np.random.default_rng(0).standard_normal([int(size) for size in sys.argv[2:]]).astype(np.float16))
begin = time.perf_counter()
import cuflash
out, lse = cuflash.flash_attention(x, x, x, causal=True, return_lse=True)
cuflash.flash_attention_backward(out, x, x, x, out, lse, causal=True)
if xp is not np:
    xp.cuda.Device().synchronize()
print(time.perf_counter() - begin)
"""


@dataclass(frozen=True, slots=True)
class _Found:
    """What came of the first calls on a problem, by the contestants' names."""

    contestants: dict[str, Contestant] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # MiB
    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class Meter:
    """Measures problems on one device beside the peers, and remembers how fast those were.

    The first of `peers` is cuflash, whose results are what the others' are compared with.
    """

    def __init__(self, device: Cpu | Gpu, peers: Sequence[Peer]) -> None:
        self.device = device
        obstacles = {peer.name: peer.obstacle(device.on_gpu) for peer in peers}
        self.peers = [peer for peer in peers if not obstacles[peer.name]]
        self.missing = {name: obstacle for name, obstacle in obstacles.items() if obstacle}  # on this machine
        self._seconds_per_flop: dict[tuple[str, str], float] = {}

    def row(self, table: Table, workload: Workload) -> dict[str, Any]:
        """The row of results: the problem, a number for each contestant, why others have none, and the largest errors
        of the sampled rows against float64.

        A contestant with a wrong result is not timed: its reason begins with WRONG.
        """
        if table.quantity == "start":
            return {**workload.cell, **_start(self.device, workload), "missing": {}, "errors": {}}
        found = self._verified(table, workload)
        values = found.peaks
        if found.contestants:
            try:
                values = self._values(table, workload, found.contestants)
            except Exception as error:  # each alone had memory enough, but not beside what the others keep
                found.missing.update(dict.fromkeys(found.contestants, _out_of_memory(error)))
            found.contestants.clear()
            self.device.release()
        rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
        return {**workload.cell, **rounded, "missing": found.missing, "errors": found.errors}

    def _verified(self, table: Table, workload: Workload) -> _Found:
        """The contestants whose results hold.

        Where memory is measured, it is that of the call which is verified, since at great lengths every call takes
        long; then no contestants are left for other measurements, and none holds memory beside the next.
        """
        found = _Found()
        try:
            inputs = self.device.draw(workload)
            exact = verify.exact_rows(workload, inputs)
        except Exception as error:
            found.missing[OURS] = _out_of_memory(error)
            return found
        ours: Sequence[Any] = ()
        for peer in self.peers:
            if peer.quantity not in (None, table.quantity):
                continue
            try:
                contestant, peak, results = self._first_call(table, workload, peer, inputs)
                ours = ours or results
                found.errors[peer.name] = float(f"{verify.check(peer.name, results, ours, exact):.3g}")
            except WrongResult as error:
                found.missing[peer.name] = f"{WRONG}: {error}"
                if peer.name == OURS:
                    break
            except Exception as error:  # whatever a peer raises, the others go on
                if peer.name == OURS:
                    found.missing[OURS] = _out_of_memory(error)
                    break
                found.missing[peer.name] = _reason(error)
            else:
                if peak is None:
                    found.contestants[peer.name] = contestant
                else:
                    found.peaks[peer.name] = peak / 2**20
            contestant = results = None
            self.device.release()
        return found

    def _first_call(
        self, table: Table, workload: Workload, peer: Peer, inputs: Inputs
    ) -> tuple[Contestant, int | None, Sequence[Any]]:
        """The peer's contestant, the bytes that its call held at most where the table is of memory, and its results as
        arrays of NumPy or CuPy. Raises whatever the peer raises, and NotImplementedError where it is not asked."""
        if reason := peer.refuses(workload):
            raise NotImplementedError(reason)
        foreseen = self._foreseen(table, peer.name, workload)
        of_memory, peak = table.quantity == "memory", None
        calls = 1 if of_memory else 2  # verified, and timed
        if calls * foreseen > PATIENCE and peer.name != OURS:
            raise NotImplementedError(f"too long, about {foreseen:.0f} s a call")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains by warnings what its error says
            contestant = peer.prepare(workload, inputs)
            if of_memory and contestant.peak is None:
                raise NotImplementedError("its memory is not measured")
            with contestant.scope():
                if foreseen == 0 or (foreseen < SLOW and not of_memory):
                    contestant.call()  # compiles
                    self.device.synchronize()
                    self.device.release()
                begin = time.perf_counter()
                if of_memory and contestant.peak is not None:
                    peak, results = contestant.peak()
                else:
                    results = contestant.call()
            if contestant.wait is not None:
                contestant.wait(results)
        self.device.synchronize()
        self._seconds_per_flop[table.name, peer.name] = (time.perf_counter() - begin) / workload.flops
        return contestant, peak, [contestant.native(x) for x in results]

    def _foreseen(self, table: Table, name: str, workload: Workload) -> float:
        """Seconds of a call, by the speed of the last one in the table; 0 before any."""
        return self._seconds_per_flop.get((table.name, name), 0.0) * workload.flops

    def _values(self, table: Table, workload: Workload, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        """What each contestant reaches of the table's quantity."""
        if table.quantity == "host":
            return self._host_microseconds(contestants)
        once = {name: self._foreseen(table, name, workload) for name in contestants}
        work = workload.flops / 1e12 if table.quantity == "speed" else self._cache_bytes(workload) / 1e9
        return {name: work / seconds for name, seconds in self._medians(contestants, once).items()}

    def _medians(self, contestants: Mapping[str, Contestant], once: Mapping[str, float]) -> dict[str, float]:
        """Seconds of a call of each, `once` being about that: medians of interleaved rounds, after those that warm up.

        The order moves on by one from round to round, so that what a contestant leaves behind, heat for one, does not
        always meet the same.
        """
        device, share = self.device, BUDGET / max(1, len(contestants))
        repeats = {name: max(1, round(device.burst / seconds)) for name, seconds in once.items()}
        before = {name: round(device.lead / seconds) for name, seconds in once.items()}
        rounds = device.warm_up + device.rounds
        # A slow one joins for the last rounds alone.
        joins = {
            name: rounds - max(1, min(rounds, int(share / (once[name] * (repeats[name] + before[name])))))
            for name in contestants
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds):
            for name in _from(number, list(contestants)):
                if number >= joins[name]:
                    times[name].append(device.seconds(contestants[name], repeats[name], before[name]))
        return {name: statistics.median(found[max(0, device.warm_up - joins[name]) :]) for name, found in times.items()}

    def _host_microseconds(self, contestants: Mapping[str, Contestant]) -> dict[str, float]:
        """What a call takes the host: medians of interleaved rounds of many calls, the device not waited for."""
        times: dict[str, list[float]] = {name: [] for name in contestants}
        calls = _HOST_CALLS if self.device.on_gpu else 1  # a CPU does the work itself
        for number in range(_HOST_WARM_UP + _HOST_ROUNDS):
            for name in _from(number, list(contestants)):
                contestant = contestants[name]
                with contestant.scope():
                    self.device.synchronize()
                    results = None
                    begin = time.perf_counter()
                    for _ in range(calls):
                        results = contestant.call()
                    if not self.device.on_gpu and contestant.wait is not None:
                        contestant.wait(results)
                    times[name].append((time.perf_counter() - begin) / calls * 1e6)
        return {name: statistics.median(found[_HOST_WARM_UP:]) for name, found in times.items()}

    def _cache_bytes(self, workload: Workload) -> float:
        """Of keys and values."""
        itemsize = 2 if self.device.on_gpu else 4
        return 2.0 * workload.batch * workload.length * workload.kv_heads * workload.head_dim * itemsize


def _from(number: int, names: list[str]) -> list[str]:
    """The names in a circle, from this one on."""
    first = number % len(names)
    return names[first:] + names[:first]


def _start(device: Cpu | Gpu, workload: Workload) -> dict[str, float]:
    """Seconds of a process's first forward and backward, importing cuflash included: without and with its kernels in
    the cache on disk."""
    shape = [str(size) for size in workload.shapes[0]]
    command = [sys.executable, "-c", _START, "gpu" if device.on_gpu else "cpu", *shape]
    with tempfile.TemporaryDirectory() as cache:
        found = []
        for _ in range(2):
            environment = {**os.environ, "CUFLASH_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"a fresh process failed: {done.stderr.strip().splitlines()[-1]}")
            found.append(round(float(done.stdout), 4))
    return {"empty cache": found[0], "filled cache": found[1]}


def _out_of_memory(error: Exception) -> str:
    """The reason why this device cannot do a problem; an error that is not about memory is raised again."""
    reason = _reason(error)
    if not reason.startswith(OUT_OF_MEMORY):
        raise error
    return reason


def _reason(error: Exception) -> str:
    """An error as a reason, at most 200 characters: torch's are long. Lack of memory always begins alike."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        text = f"{OUT_OF_MEMORY}: {text}"
    return text if len(text) <= 200 else text[:197] + "..."
