"""Makes pictures and a page of all results, from the files that the benchmarks saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, THEIRS, FLOOR = "#1b6ca8", "#b9bec4", "#7a8288"
KINDS = {"ours": OURS, "torch": "#e08a00", "tc": "#4f9d4f", "linear": "#b04a5a", "floor": FLOOR}
TITLES = {
    "crossing": "Crossing latency",
    "round_trips": "Round trips, messages and bytes",
    "scale": "Scale",
    "event_loop": "The event loop",
    "staging": "Staging and uploading meanwhile",
    "break_latency": "Break latency",
    "deadlines": "One deadline for many ranks",
    "waiting": "Cost of waiting",
    "start": "Import and start",
    "step_signal": "Asking at each step",
    "at_once": "Phases awaited at once",
}


def main() -> None:
    page = ["# Results", "", "Written by `make bench`; see [the other page](../README.md) for what"]
    page += ["is measured and how to read it.", ""]
    for name, title in TITLES.items():
        data = results.load(name)
        if data is None:
            continue
        page += [f"## {title}", ""]
        if draw := DRAWINGS.get(name):
            figure = draw(data)
            figure.savefig(results.RESULTS / f"{name}.png", dpi=110, bbox_inches="tight")
            plt.close(figure)
            page += [f"![{title}]({name}.png)", ""]
        text = (results.RESULTS / f"{name}.txt").read_text().rstrip()
        page += ["```text", text, "```", ""]
    (results.RESULTS / "README.md").write_text("\n".join(page))
    print(f"wrote {Path('results/README.md')}")


def draw_crossing(data: dict[str, Any]) -> Figure:
    sizes = data["sizes"]
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(4.6 * len(sizes), 7), squeeze=False, sharey=True
    )
    for axes, (size, found) in zip(panels[0], sizes.items(), strict=True):
        ratios = found["ratios"][::-1]
        names = [f"ours: {ratio['use']}, {ratio['store']}, {ratio['loop']}" for ratio in ratios]
        bars(axes, names, ratios, 1)
        axes.plot([ratio["goal"] for ratio in ratios], names, "k|", markersize=8, label="goal")
        axes.axvline(1, color="red", alpha=0.4)
        axes.set_title(f"{size} processes")
        axes.set_xlabel("of the best alternative's time (median, quartiles)")
        axes.legend()
    figure.tight_layout()
    return figure


def draw_round_trips(data: dict[str, Any]) -> Figure:
    figure, (trips, received) = plt.subplots(1, 2, figsize=(11, 4))
    for kind in dict.fromkeys(row["kind"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["kind"] == kind]
        sizes = [row["size"] for row in rows]
        color = KINDS[kind]
        for part, style in (("critical", "--"), ("all", "-")):
            most = [row[part]["round_trips"]["max"] for row in rows]
            label = f"{kind}, {'critical path' if part == 'critical' else 'in all'}"
            if kind == "ours":
                trips.plot(sizes, most, style, marker="o", color=color, label=label)
            elif part == "all":
                trips.plot(sizes, most, ":", marker=".", color=color, label=kind)
        every = [row["all"]["bytes_received"]["mean"] for row in rows]
        received.plot(sizes, every, marker=".", color=color, label=kind)
    trips.set_title("round trips of the busiest rank, per crossing")
    trips.set_ylim(0, 12)
    received.set_title("bytes received per rank and crossing")
    received.set_yscale("log")
    for axes in (trips, received):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def draw_scale(data: dict[str, Any]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    fields = {
        "wall_secs": ("ms per crossing, two cores for all ranks", 1e-3),
        "server_cpu_secs_per_rank": ("us of the server's CPU, per rank and crossing", 1e-6),
    }
    for axes, (field, (title, unit)) in zip(panels, fields.items(), strict=True):
        for kind in dict.fromkeys(row["kind"] for row in data["rows"]):
            rows = [row for row in data["rows"] if row["kind"] == kind]
            middle = [row[field]["median"] / unit for row in rows]
            low = [(row[field]["median"] - row[field]["q1"]) / unit for row in rows]
            high = [(row[field]["q3"] - row[field]["median"]) / unit for row in rows]
            sizes = [row["size"] for row in rows]
            axes.errorbar(sizes, middle, [low, high], marker="o", label=kind, color=KINDS[kind])
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def draw_event_loop(data: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4))
    rows = data["rows"][::-1]
    names = [f"{row['kind']}, {row['phases']}" if row["phases"] else row["kind"] for row in rows]
    for field, marker in (("median_secs", "o"), ("p99_secs", "s"), ("worst_secs", "x")):
        axes.plot([row[field] * 1e3 for row in rows], names, marker, label=field.split("_")[0])
    axes.set_xscale("log")
    axes.set_xlabel("lag of a 1 ms ticker, ms")
    axes.axvline(50, color="red", alpha=0.4, label="what is allowed")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def draw_staging(data: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 3))
    rows = data["rows"][::-1]
    names = [f"{row['kind']}, {row['phases']}" if row["phases"] else row["kind"] for row in rows]
    bars(axes, names, [row["mb_per_sec"] for row in rows], 1)
    axes.set_xlabel("MB/s copied and written while phases are pending")
    return figure


def draw_break_latency(data: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4))
    rows = data["rows"][::-1]
    names = [f"{row['way']}, {row['size']} ranks" for row in rows]
    bars(axes, names, [row["each_secs"] for row in rows], 1e-3)
    axes.plot([row["each_secs"]["max"] * 1e3 for row in rows], names, "kx", label="worst")
    axes.set_xlabel("ms from giving up to the error on another rank (median, quartiles)")
    axes.legend()
    return figure


def bars(axes: Axes, names: list[str], spreads: list[dict[str, float]], unit: float) -> None:
    """Draw one bar for each, with its quartiles."""
    middle = [of["median"] / unit for of in spreads]
    low = [(of["median"] - of["q1"]) / unit for of in spreads]
    high = [(of["q3"] - of["median"]) / unit for of in spreads]
    axes.barh(names, middle, xerr=[low, high], color=[colour(name) for name in names])
    axes.grid(axis="x", alpha=0.3)


def colour(name: str) -> str:
    if name.startswith(("ours", "abort", "cancel", "exception", "(")):
        return OURS
    return FLOOR if name.startswith("floor") else THEIRS


DRAWINGS = {
    "crossing": draw_crossing,
    "round_trips": draw_round_trips,
    "scale": draw_scale,
    "event_loop": draw_event_loop,
    "staging": draw_staging,
    "break_latency": draw_break_latency,
}

if __name__ == "__main__":
    main()
