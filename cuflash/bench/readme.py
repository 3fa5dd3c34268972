"""README's section on speed, made from the files of results: nothing between the markers is written by hand."""

from __future__ import annotations

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


def around(text: str) -> tuple[str, str]:
    """What stands before and after the section in README's `text`, markers included. Raises ValueError without them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: got no {END if begin else BEGIN}; allowed: both markers, in this order")
    return head + begin, end + tail


def regenerate(text: str, folder: Path, root: Path) -> str:
    """README's `text`, with the section between the markers made from the GPU results in `folder`.

    `root` is README's folder, which links are relative to. Raises ValueError without markers or without results.
    """
    before, after = around(text)
    return f"{before}\n\n{section(folder, root)}\n\n{after}"


def section(folder: Path, root: Path) -> str:
    """For each GPU its tables, where they come from, and the pictures."""
    found = [(path, record) for path, record in results.stored(folder) if record["gpu"] is not None]
    if not found:
        raise ValueError(f"json: got {folder}, which holds no results of a GPU; allowed: a folder with some")
    return "\n\n".join(
        part for gpu, pairs in groupby(found, lambda pair: pair[1]["gpu"]) for part in _of_gpu(gpu, list(pairs), root)
    )


def _of_gpu(gpu: str, pairs: list[tuple[Path, dict[str, Any]]], root: Path) -> Iterator[str]:
    grids = [record for _, record in pairs if record["table"] in GRIDS]
    yield from (_grid(record) for record in grids)
    if grids:
        yield _wrapped(
            f"{gpu}, bfloat16, {TOKENS:,} tokens in sequences of the length given, or one that is longer, hidden "
            f"{HIDDEN:,}; {_origin(grids)}."
        )
    for _, record in pairs:
        if record["table"] not in GRIDS:
            yield _list(record)
            yield _wrapped(f"{gpu}; {_origin([record])}.")
    for path, record in pairs:
        if results.drawable(record):
            link = Path(os.path.relpath(results.picture_of(path), root)).as_posix()
            yield f"![{record['table'].replace('_', ', ')} on {gpu}, every contestant against the length]({link})"


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


def _with_ratio(row: dict[str, Any]) -> str:
    if OURS not in row:
        return "–"
    return f"{row[OURS]:.0f}" + (f" ({row[OURS] / row[YARDSTICK]:.2f})" if YARDSTICK in row else "")


def _list(record: dict[str, Any]) -> str:
    """Any other table: problems down, contestants across."""
    names = list(dict.fromkeys(name for row in record["rows"] for name in results.contestants(row)))
    return _table(
        [f"{record['table'].replace('_', ', ')}, {record['unit']}", *names],
        [
            [results.problem(row), *(f"{row[name]:,.4g}" if name in row else "–" for name in names)]
            for row in record["rows"]
        ],
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, 120, break_long_words=False, break_on_hyphens=False)


def _origin(records: list[dict[str, Any]]) -> str:
    """The versions and dates of results: torch 2.11.0, cuDNN 91900; 2026-11-24."""
    versions = dict.fromkeys(
        f"{name} {record[key]}" for key, name in LIBRARIES.items() for record in records if record.get(key) is not None
    )
    return f"{', '.join(versions)}; {', '.join(sorted({record['date'] for record in records}))}"
