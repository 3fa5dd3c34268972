"""What the demo leaves behind: a JSON report and a picture drawn from it, complete or not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

JSON_NAME, PICTURE_NAME = "report.json", "report.png"
_CUFLASH, _STANDARD, _QUIET = "#00798c", "#d1495b", "#6c757d"


def write(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write both into the existing `folder`, the JSON first and at once whole; their paths."""
    json_path, picture_path = folder / JSON_NAME, folder / PICTURE_NAME
    write_json(report, json_path)
    picture(report).savefig(picture_path)
    return json_path, picture_path


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write `report` to `path`, which at every moment holds an old or a new report whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def picture(report: dict[str, Any]) -> Figure:
    """Memory against length, bits per byte over training; a part that was not measured says so. 1200 x 480 pixels."""
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#e9ecef", linewidth=0.8)
        axes.set_axisbelow(True)
    _draw_memory(left, report)
    _draw_training(right, report)
    return figure


def _draw_memory(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("Peak memory of attention, forward + backward")
    memory = report.get("memory", {"points": []})
    points = memory["points"]
    if not any(point["peak_bytes"] for point in points):
        _say_not_measured(axes)
        return
    labels = {"standard": "standard attention", "cuflash": "cuflash"}
    for name, colour in (("standard", _STANDARD), ("cuflash", _CUFLASH)):
        measured = [(p["length"], p["peak_bytes"] / 2**20) for p in points if p["name"] == name and p["peak_bytes"]]
        guessed = [(p["length"], p["estimated_bytes"] / 2**20) for p in points if p["name"] == name and p["missing"]
                   and p["estimated_bytes"]]  # fmt: skip
        if measured:
            axes.plot(*zip(*measured, strict=True), "o-", color=colour, linewidth=2, label=labels[name])
            axes.annotate(
                format_bytes(measured[-1][1] * 2**20), measured[-1], xytext=(-6, 6), textcoords="offset points",
                ha="right", color=colour, fontweight="bold",
            )  # fmt: skip
        if guessed:
            line = [*measured[-1:], *guessed]
            axes.plot(
                *zip(*line, strict=True), "o--", color=colour, linewidth=1.2, markerfacecolor="white", alpha=0.7,
                markevery=range(len(line) - len(guessed), len(line)), label="does not fit or takes too long (estimate)",
            )  # fmt: skip
    lengths = sorted({point["length"] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda mebibytes, _: format_bytes(mebibytes * 2**20))
    axes.set_xlabel(f"tokens  ({memory['heads']} heads of {memory['head_dim']}, {memory['dtype']}, causal)")
    axes.legend(frameon=False, loc="upper left")


def _draw_training(axes: Axes, report: dict[str, Any]) -> None:
    training = report.get("training")
    if not training or not training["held_out"]:
        axes.set_title("Training")
        _say_not_measured(axes)
        return
    axes.set_title(f"Training on {training['context']:,} tokens of real text at a time")
    steps = training["train"]
    if steps:
        axes.plot(
            [point["step"] for point in steps], [point["bits_per_byte"] for point in steps],
            color=_CUFLASH, linewidth=1, alpha=0.35, label="training window",
        )  # fmt: skip
    held_out = [(point["step"], point["bits_per_byte"]) for point in training["held_out"]]
    axes.plot(*zip(*held_out, strict=True), "o-", color=_CUFLASH, linewidth=2, label="held-out text")
    axes.annotate(
        f"{held_out[-1][1]:.2f}", held_out[-1], xytext=(0, -16), textcoords="offset points", ha="center",
        color=_CUFLASH, fontweight="bold",
    )  # fmt: skip
    for order, style in ((0, "--"), (1, ":")):
        entropy = training[f"order_{order}_bits"]
        label = f"order-{order} entropy of the text, {entropy:.2f}"
        axes.axhline(entropy, color=_QUIET, linestyle=style, linewidth=1.5, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False, loc="upper right")


def _say_not_measured(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=_QUIET)
    axes.set_xticks([])
    axes.set_yticks([])


def format_tokens(length: int) -> str:
    """A length for people: 512, 64K."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def format_bytes(count: float) -> str:
    """Bytes for people: 512 KiB, 3.4 MiB, 16 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
