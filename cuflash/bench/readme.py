"""What README says of speed, made from the files of results: nothing between the markers is written by hand."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from cuflash.bench import results
from cuflash.bench.peers import OURS
from cuflash.bench.workloads import HIDDEN, TOKENS

BEGIN = "<!-- speed: begin; written by `cuflash bench --update-readme` -->"
END = "<!-- speed: end -->"
SHORT = ("<!-- speed in short: begin; as below -->", "<!-- speed in short: end -->")  # optional, for the first screen
GRIDS = ("forward", "backward")  # the tables of the suite `paper`: problems down, lengths across
YARDSTICK = "CUDNN_ATTENTION"
LIBRARIES = {  # the keys of their versions in a record, and their names
    "torch": "torch",
    "cudnn": "cuDNN",
    "jax": "jax",
    "flash_attn": "flash_attn",
    "xformers": "xformers",
    "cupy": "CuPy",
    "cuflash": "cuflash",
}
_Pair = tuple[Path, dict[str, Any]]  # a file of results and its record


def around(text: str, markers: tuple[str, str] = (BEGIN, END)) -> tuple[str, str]:
    """What stands before and after the section in README's `text`, markers included. Raises ValueError without them."""
    head, begin, rest = text.partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"README.md: got no {markers[1 if begin else 0]}; allowed: both markers, in this order")
    return head + begin, end + tail


def check(text: str) -> None:
    """Raise ValueError unless README's `text` has the markers of the section, and both of SHORT or none."""
    for markers in _markers(text):
        around(text, markers)


def regenerate(text: str, folder: Path, root: Path) -> str:
    """README's `text`, with the section between the markers made from the GPU results in `folder`, and with the
    sentences in short where it has markers for them.

    `root` is README's folder, which links are relative to. Raises ValueError without markers or without results.
    """
    for markers in _markers(text):
        before, after = around(text, markers)
        part = short(folder) if markers == SHORT else section(folder, root)
        text = f"{before}\n\n{part}\n\n{after}"
    return text


def short(folder: Path) -> str:
    """For each GPU a sentence: how its grids compare with cuDNN."""
    sentences = []
    for gpu, pairs in _by_gpu(folder):
        grids = [(record["table"], _ratios(record)) for _, record in pairs if record["table"] in GRIDS]
        compared = [
            f"{name} {_mean(ratios):.2f} ({len(ratios)} problems, {min(ratios):.2f} to {max(ratios):.2f})"
            for name, ratios in grids
            if ratios
        ]
        if compared:
            sentences.append(_wrapped(f"**Speed** on {gpu}, times cuDNN's in geometric mean: {', '.join(compared)}."))
    return "\n\n".join(sentences)


def section(folder: Path, root: Path) -> str:
    """For each GPU the grids, where they come from and their pictures; then, folded, the same of its other tables."""
    return "\n\n".join(part for gpu, pairs in _by_gpu(folder) for part in _of_gpu(gpu, pairs, root))


def _markers(text: str) -> list[tuple[str, str]]:
    return [(BEGIN, END), SHORT] if any(marker in text for marker in SHORT) else [(BEGIN, END)]


def _by_gpu(folder: Path) -> list[tuple[str, list[_Pair]]]:
    found = [pair for pair in results.stored(folder) if pair[1]["gpu"] is not None and "path" not in pair[1]]
    if not found:
        raise ValueError(f"json: got {folder}, which holds no results of a GPU; allowed: a folder with some")
    return [(gpu, list(pairs)) for gpu, pairs in groupby(found, lambda pair: pair[1]["gpu"])]


def _of_gpu(gpu: str, pairs: list[_Pair], root: Path) -> Iterator[str]:
    grids = [pair for pair in pairs if pair[1]["table"] in GRIDS]
    others = [pair for pair in pairs if pair[1]["table"] not in GRIDS]
    yield from (_grid(record) for _, record in grids)
    if grids:
        yield _wrapped(
            f"{gpu}, bfloat16, {TOKENS:,} tokens in sequences of the length given, or one that is longer, hidden "
            f"{HIDDEN:,}; {_origin(grids)}."
        )
        yield from _pictures(grids, root)
    if others:
        names = ", ".join(_title(record) for _, record in others)
        yield f"<details>\n<summary>More on {gpu}, every contestant: {names}</summary>"
        yield from (_list(record) for _, record in others)
        yield _wrapped(f"{_origin(others)}.")
        yield from _pictures(others, root)
        yield "</details>"


def _pictures(pairs: list[_Pair], root: Path) -> Iterator[str]:
    for path, record in pairs:
        if results.drawable(record):
            link = Path(os.path.relpath(results.picture_of(path), root)).as_posix()
            yield f"![{_title(record)} on {record['gpu']}, every contestant against the length]({link})"


def _title(record: dict[str, Any]) -> str:
    return record["table"].replace("_", " ")


def _grid(record: dict[str, Any]) -> str:
    rows = record["rows"]
    lengths = sorted({row["length"] for row in rows})
    problems = sorted({(row["head_dim"], row["causal"]) for row in rows})
    cells = {(row["head_dim"], row["causal"], row["length"]): _with_ratio(row) for row in rows}
    return _table(
        [f"{record['table']}, {record['unit']} (ratio to cuDNN)", *(f"{length:,}" for length in lengths)],
        [
            [f"head_dim {head_dim}, {'causal' if causal else 'full'}"]
            + [cells.get((head_dim, causal, length), "–") for length in lengths]
            for head_dim, causal in problems
        ],
    )


def _ratios(record: dict[str, Any]) -> list[float]:
    """How many times faster than cuDNN, for each row that has both."""
    return [row[OURS] / row[YARDSTICK] for row in record["rows"] if OURS in row and YARDSTICK in row]


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _with_ratio(row: dict[str, Any]) -> str:
    if OURS not in row:
        return "–"
    return f"{row[OURS]:.0f}" + (f" ({row[OURS] / row[YARDSTICK]:.2f})" if YARDSTICK in row else "")


def _list(record: dict[str, Any]) -> str:
    """Any other table: problems down, contestants across."""
    names = list(dict.fromkeys(name for row in record["rows"] for name in results.contestants(row)))
    return _table(
        [f"{_title(record)}, {record['unit']}", *names],
        [
            [results.problem(row), *(f"{row[name]:,.4g}" if name in row else "–" for name in names)]
            for row in record["rows"]
        ],
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, 120, break_long_words=False, break_on_hyphens=False)


def _origin(pairs: list[_Pair]) -> str:
    """The versions and dates of results: torch 2.11.0, cuDNN 91900; 2026-11-24."""
    records = [record for _, record in pairs]
    versions = dict.fromkeys(
        f"{name} {record[key]}" for key, name in LIBRARIES.items() for record in records if record.get(key) is not None
    )
    return f"{', '.join(versions)}; {', '.join(sorted({record['date'] for record in records}))}"
