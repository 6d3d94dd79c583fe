"""The picture of a conversion: training loss, held-out perplexity, and each layer's error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = {"start": "as copied", "0-calibrate": "calibrated", "1-align": "aligned", "2-distil": "distilled"}


def plot_report(facts: dict[str, Any], path: str | Path) -> None:
    """Draw what `fla_swap.conversion.convert` reports, as a PNG of three panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out, layers = figure.subplots(1, 3)
    _training(training, facts["history"])
    _held_out(held_out, facts["perplexities"])
    _layers(layers, facts["layer_errors"])
    name = Path(facts["model"]).name
    figure.suptitle(f"{name} → {facts['config']['mixer']}, {facts['tokens']:,} training tokens")
    figure.savefig(str(path), dpi=110)


def _training(axes: Any, history: list[dict[str, Any]]) -> None:
    begin = 0.0
    for stage in dict.fromkeys(entry["stage"] for entry in history):
        entries = [entry for entry in history if entry["stage"] == stage]
        seconds = [begin + entry["seconds"] for entry in entries]
        axes.plot(seconds, [entry["loss"] for entry in entries], label=stage, linewidth=1)
        begin = seconds[-1]
    axes.set(title="training loss", xlabel="seconds", yscale="log")
    if history:
        axes.legend()


def _held_out(axes: Any, perplexities: dict[str, float]) -> None:
    names = [LABELS.get(name, name) for name in perplexities]
    bars = axes.bar(names, list(perplexities.values()), color="tab:blue")
    axes.bar_label(bars, fmt="%.4g")
    axes.set(title="held-out perplexity", yscale="log")
    axes.tick_params(axis="x", rotation=20)


def _layers(axes: Any, errors: dict[str, list[dict[str, Any]]]) -> None:
    for moment, layers in errors.items():
        axes.plot([e["relative"] for e in layers], marker="o", label=LABELS.get(moment, moment))
    axes.set(title="error of each swapped layer", xlabel="layer, of those swapped", ylabel="‖y − y*‖ / ‖y*‖")
    axes.set_ylim(bottom=0)
    if errors:
        axes.legend()
