"""`compare.html`, `curves.png` and `curves.csv` of a comparison, all from the same panels."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from kimi_rl.compare.panels import BANDS_NOTE, Line, Panel
from kimi_rl.progress import duration
from kimi_rl.report.page import render_page
from kimi_rl.report.report import percent
from kimi_rl.run_dir import atomic_write_text

# The most points that are worth a marker of their own.
_MARKERS_TO = 30


def write_page(target: Path, result: dict[str, Any], panels: list[Panel]) -> None:
    """Write the report page: one file that needs no network. `result` is what compare.json holds."""
    filters = {
        "percent": percent, "duration": duration, "amount": amount, "difference": difference, "bytes": _bytes
    }  # fmt: skip
    sections: dict[str, list[dict[str, Any]]] = {}
    for number, panel in enumerate(panels):
        sections.setdefault(panel.section, []).append({"title": panel.title, "note": panel.note, "number": number})
    figures = [figure(panel) for panel in panels]
    values = dict(result=result, sections=sections, bands_note=BANDS_NOTE)
    atomic_write_text(target, render_page(Path(__file__).with_name("page.html"), figures, filters, **values))


def figure(panel: Panel) -> dict[str, Any]:
    """The panel as a plotly figure (plain data)."""
    traces = []
    for line in panel.lines:
        for width, opacity in _widths(line):
            x, low, high = _edges(line, width, panel)
            traces.append(
                {"type": "scatter", "mode": "lines", "x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "fill": "toself",
                 "fillcolor": _with_alpha(line.colour, opacity), "line": {"width": 0}, "hoverinfo": "skip",
                 "showlegend": False, "legendgroup": line.arm}
            )  # fmt: skip
        for seed, values in line.seeds.items() if len(line.seeds) > 1 else ():
            traces.append(
                {"type": "scatter", "mode": "lines", "x": _short(line.x), "y": _short(values), "opacity": 0.4,
                 "line": {"color": line.colour, "width": 0.8}, "hoverinfo": "skip", "showlegend": False,
                 "legendgroup": line.arm, "name": f"{line.arm}, seed {seed}"}
            )  # fmt: skip
        traces.append(
            {"type": "scatter", "mode": "lines+markers" if len(line.x) <= _MARKERS_TO else "lines",
             "x": _short(line.x), "y": _short(line.band.mean), "name": line.arm, "legendgroup": line.arm,
             "line": {"color": line.colour, "width": 2, "dash": "dot" if _is_floor(line) else "solid"},
             "marker": {"size": 5}, "hovertemplate": "%{y:.1%}" if panel.percent else "%{y:.4~g}"}
        )  # fmt: skip
    y_axis: dict[str, Any] = {"title": {"text": panel.y_label}} if panel.y_label else {}
    if panel.percent:
        y_axis["tickformat"] = ".2~%"  # as many decimals as tell the ticks apart, at most two
    if panel.log:
        y_axis |= {"type": "log", "exponentformat": "power"}
    x_axis: dict[str, Any] = {"title": {"text": panel.x_label}}
    if panel.log_x:
        ticks = panel.lines[0].x.tolist()
        x_axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{value:,.0f}" for value in ticks]}
    layout: dict[str, Any] = {"xaxis": x_axis, "yaxis": y_axis, "showlegend": True}
    if panel.zero:
        layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0,
                             "line": {"width": 1, "dash": "dash", "color": "#8b93a1"}}]  # fmt: skip
    return {"data": traces, "layout": layout}


def write_png(target: Path, panels: list[Panel], title: str) -> None:
    """The panels as one picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    columns = 3
    rows = max(1, -(-len(panels) // columns))
    height = 3.4 * rows + 0.5
    picture = Figure(figsize=(5.2 * columns, height))
    picture.suptitle(title, fontsize=11, y=1 - 0.15 / height)
    # Margins in inches, not matplotlib's constrained layout, which takes seconds.
    picture.subplots_adjust(0.05, 0.5 / height, 0.985, 1 - 0.6 / height, wspace=0.22, hspace=0.45)
    grid = picture.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid, panels, strict=False):
        for line in panel.lines:
            for width, opacity in _widths(line):
                x, low, high = _edges(line, width, panel)
                axes.fill_between(x, low, high, color=line.colour, alpha=opacity, linewidth=0)
            for values in line.seeds.values() if len(line.seeds) > 1 else ():
                axes.plot(line.x, values, color=line.colour, alpha=0.4, linewidth=0.6)
            axes.plot(
                line.x, line.band.mean, color=line.colour, linewidth=1.6, label=line.arm,
                marker="o" if len(line.x) <= _MARKERS_TO else None, markersize=3,
                linestyle=":" if _is_floor(line) else "-",
            )  # fmt: skip
        axes.set_title(f"{panel.section}: {panel.title}", fontsize=9)
        axes.set_xlabel(panel.x_label, fontsize=8)
        axes.set_ylabel(panel.y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if panel.log:
            axes.set_yscale("log")
        if panel.log_x:
            axes.set_xscale("log")
            axes.set_xticks(panel.lines[0].x, [f"{value:,.0f}" for value in panel.lines[0].x])
            axes.minorticks_off()
        if panel.zero:
            axes.axhline(0, color="#8b93a1", linewidth=0.8, linestyle="--")
        axes.legend(fontsize=7, frameon=False)
    picture.savefig(target, dpi=110)


def write_csv(target: Path, panels: list[Panel]) -> None:
    """Every plotted number: one row per point of a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["section", "panel", "x_axis", "line", "kind", "x", "y"])
    for panel in panels:
        for line in panel.lines:
            kinds = {"mean": line.band.mean} | {f"seed {seed}": values for seed, values in line.seeds.items()}
            for name, (width, _) in zip(("pointwise", "simultaneous"), reversed(_widths(line)), strict=False):
                _, low, high = _edges(line, width, panel)
                kinds |= {f"{name} low": low, f"{name} high": high}
            for kind, values in kinds.items():
                for x, y in zip(line.x, values, strict=True):
                    writer.writerow([panel.section, panel.title, panel.x_label, line.arm, kind, f"{x:.8g}", f"{y:.8g}"])
    atomic_write_text(target, out.getvalue())


def _widths(line: Line) -> list[tuple[np.ndarray, float]]:
    """Half-widths of the line's bands with their opacity, the wide one first."""
    if line.band.pointwise is None or line.band.simultaneous is None:
        return []
    return [(np.full(len(line.x), line.band.simultaneous), 0.10), (line.band.pointwise, 0.22)]


def _edges(line: Line, width: np.ndarray, panel: Panel) -> tuple[list[float], list[float], list[float]]:
    """x, lower and upper edge of a band, inside what the quantity can be."""
    low, high = line.band.mean - width, line.band.mean + width
    if panel.percent and not panel.zero:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    elif panel.log:
        low = np.maximum(low, 0.1 * line.band.mean)
    elif not panel.zero:
        low = np.maximum(low, 0) if (line.band.mean >= 0).all() else low
    return _short(line.x), _short(low), _short(high)


def _short(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def _is_floor(line: Line) -> bool:
    return line.arm.endswith("memory floor")


def _with_alpha(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def amount(value: float | None, unit: str) -> str:
    """A figure in its unit: accuracies in percent, the rest in whole numbers or three digits."""
    if value is None:
        return "–"
    if unit == "accuracy":
        return f"{value:.1%}"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def difference(value: float | None, unit: str) -> str:
    """A signed difference: accuracies in percentage points."""
    if value is None:
        return "–"
    if unit == "accuracy":
        return f"{100 * value:+.1f} pp"
    return f"{value:+,.0f} {unit}" if abs(value) >= 100 else f"{value:+.3g} {unit}"


def _bytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"
