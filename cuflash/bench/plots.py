"""The picture of a table of results: numbers against the length, one line a contestant."""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cuflash.bench.peers import OURS, PEERS
from cuflash.bench.results import OUT_OF_MEMORY, contestants, device_of
from cuflash.bench.workloads import UNITS
from cuflash.demo.report import format_bytes, format_tokens

_COLOURS = {peer.name: colormaps["tab20"](2 * index % 19) for index, peer in enumerate(PEERS)} | {OURS: "#00798c"}
_COLUMNS = 3


def draw(record: dict[str, Any]) -> Figure:
    """One panel for each head_dim, mask and number of key/value heads."""
    rows = record["rows"]
    keys = list(dict.fromkeys(_panel(row) for row in rows))
    columns = min(_COLUMNS, len(keys))
    rows_of_panels = -(-len(keys) // columns)
    figure = Figure(figsize=(max(6.0, 4.2 * columns), 3.4 * rows_of_panels + 0.6), dpi=85, layout="constrained")
    panels = figure.subplots(rows_of_panels, columns, squeeze=False).ravel()
    # Full and causal one above the other: the masks are the outer order.
    for panel, key in zip(panels, sorted(keys, key=lambda key: (key[1], key[0], key[2])), strict=False):
        _draw_panel(panel, record["unit"], key, [row for row in rows if _panel(row) == key])
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    what = "peak memory" if record["unit"] == UNITS["memory"] else record["unit"]
    figure.suptitle(f"{record['table'].replace('_', ' ')}: {what}, {device_of(record)}, {record['date']}")
    return figure


def _panel(row: dict[str, Any]) -> tuple[int, bool, int]:
    """(head_dim, causal, query heads that share key/value heads)."""
    return row["head_dim"], row["causal"], row.get("heads", 1) // row.get("kv_heads", 1)


def _draw_panel(axes: Axes, unit: str, key: tuple[int, bool, int], rows: list[dict[str, Any]]) -> None:
    head_dim, causal, group = key
    shared = "" if group == 1 else f", {group} heads a key/value head"
    axes.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}{shared}", fontsize="medium")
    for name in dict.fromkeys(name for row in rows for name in (*contestants(row), *row.get("missing", ()))):
        points = [(row["length"], row[name]) for row in rows if name in row]
        colour = _COLOURS.get(name)
        if points:
            axes.plot(
                *zip(*points, strict=True), "o-", color=colour, markersize=4, label=name,
                linewidth=2.4 if name == OURS else 1.4, zorder=3 if name == OURS else 2,
            )  # fmt: skip
        failed = [row["length"] for row in rows if row.get("missing", {}).get(name, "").startswith(OUT_OF_MEMORY)]
        if failed:
            axes.plot(
                failed, [0.97] * len(failed), "x", color=colour, transform=axes.get_xaxis_transform(),
                label=f"{name}: out of memory", clip_on=False,
            )  # fmt: skip
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    if unit == UNITS["memory"]:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda mebibytes, _: format_bytes(mebibytes * 2**20))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e9ecef", linewidth=0.8)
    axes.set_xlabel("tokens")
