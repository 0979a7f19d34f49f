"""Draws a timeline of what every rank did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpointing import Saving
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from report import Checkpoint, RankLog, checkpoints

STAGING, UPLOAD, WAITING = "#0b3954", "#4d9de0", "#f2c14e"
PUBLISHED, BROKEN, STEP = "#2a9d5c", "#d1495b", "#555555"


def draw(logs: Sequence[RankLog], timeout_secs: float, path: Path) -> None:
    """Draw a row of bars for every rank, below the training steps, as a picture in `path`."""
    zero = min(log.steps[0] for log in logs)
    ranks = len(logs)
    figure = Figure(figsize=(14, 1.9 + 0.75 * ranks), layout="constrained")
    axes = figure.subplots()
    axes.set_title(
        "Checkpoints are staged, uploaded and committed while training goes on",
        loc="left",
        fontweight="bold",
        pad=12,
    )

    # DDP keeps the ranks in step, so rank 0's steps are those of all.
    axes.eventplot(
        [step - zero for step in logs[0].steps],
        lineoffsets=-1,
        linelengths=0.5,
        linewidths=0.7,
        colors=STEP,
    )
    for checkpoint in checkpoints(logs, timeout_secs):
        _mark(axes, checkpoint, zero, ranks)
    for row, log in enumerate(logs):
        for saving in log.savings:
            _draw_saving(axes, saving, row, zero)
        if log.preempted is not None:
            axes.plot(log.preempted - zero, row, marker="v", color=BROKEN, markersize=9, zorder=4)
            axes.annotate("SIGTERM", (log.preempted - zero, row - 0.33), color=BROKEN, fontsize=8)
    if (stopped := logs[0].stopped) is not None:
        end = logs[0].steps[-1] - zero
        axes.vlines(end, -1.3, ranks - 0.5, color=BROKEN, linewidth=1.3, linestyle=":")
        axes.annotate(
            f"all stop at step {stopped.step}", (end + 0.02, ranks - 0.58), color=BROKEN, fontsize=8
        )

    axes.set_yticks(range(-1, ranks), ["training steps", *(f"rank {log.rank}" for log in logs)])
    axes.set_ylim(ranks - 0.45, -2.0)
    axes.margins(x=0.01)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds since the first training step")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=150)


def _mark(axes: Axes, checkpoint: Checkpoint, zero: float, ranks: int) -> None:
    """Label one checkpoint, and show its verdict."""
    started, settled = checkpoint.started - zero, checkpoint.settled - zero
    color, when, label = PUBLISHED, settled, checkpoint.name
    if not checkpoint.verdict.published:
        color, when = BROKEN, checkpoint.doomed[1] - zero
        axes.axvspan(started, settled, color=BROKEN, alpha=0.10, linewidth=0)
        culprits = ", ".join(map(str, checkpoint.verdict.culprits))
        label += f"\nbroken: rank {culprits}"
    axes.vlines(when, -0.6, ranks - 0.5, color=color, linewidth=1.3)
    axes.text(
        (started + settled) / 2, -1.42, label, color=color, ha="center", va="bottom", fontsize=9
    )


def _draw_saving(axes: Axes, saving: Saving, row: int, zero: float) -> None:
    def bar(start: float, end: float, color: str, **style: object) -> None:
        axes.barh(row, end - start, left=start - zero, height=0.56, color=color, **style)  # type: ignore[arg-type]

    uploaded = saving.failed or saving.entered or saving.settled
    staged = saving.staged or uploaded
    if saving.failed is None:
        bar(staged, uploaded, UPLOAD)
    else:
        bar(staged, uploaded, "white", edgecolor=BROKEN, hatch="////", linewidth=1)
        axes.plot(uploaded - zero, row, marker="X", color=BROKEN, markersize=9, zorder=3)
    if saving.entered is not None:
        bar(saving.entered, saving.settled, WAITING)
    # Staging takes a millisecond here; the edge keeps it visible.
    bar(saving.started, staged, STAGING, edgecolor=STAGING, linewidth=1.5)


def _legend() -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=STEP, marker="|", linestyle="", label="training step"),
        Patch(color=STAGING, label="staging"),
        Patch(color=UPLOAD, label="upload"),
        Patch(
            facecolor="white", edgecolor=BROKEN, hatch="////", label="upload that fails or hangs"
        ),
        Patch(color=WAITING, label="waiting in commit"),
        Line2D([], [], color=PUBLISHED, label="published: all ranks know"),
        Line2D([], [], color=BROKEN, label="broken"),
    ]
