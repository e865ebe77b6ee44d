"""Figures of reward models: how good one is, and what happens to those who trust it too far.

`run` is the reward stage's folder; `found` is what overoptimisation.json holds (overopt_report.py). As in plots.py a
figure's label is its text for those who cannot see it.
"""

import itertools
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from dschat_kit.notebook.plots import BLUE, GREEN, GREY, ORANGE, PINK, empty, result_of
from dschat_kit.notebook.tables import grid, named


def reward_quality(run) -> Figure:
    """Calibration (predicted against observed win rate of the answer that scores higher) and accuracy by how much
    longer the chosen answer is; bars are 95 % intervals."""
    figure, ((calibrated, length),) = grid(1, 2, (9, 3.4))
    result = result_of(run)
    if "by_margin" not in result:
        return named(empty(figure, calibrated, length), "Reward model: no result yet")
    calibrated.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="calibrated")
    for axes, rows, x, y, colour in ((calibrated, result["by_margin"], "predicted", "observed", BLUE),
                                     (length, result["by_length_difference"], "tokens", "accuracy", GREEN)):
        places, heights = ([row[name] for row in rows] for name in (x, y))
        ends = np.abs(np.array([row["interval"] for row in rows]).T - heights)
        axes.errorbar(places, heights, ends, color=colour, marker="o", markersize=5, capsize=3, linewidth=1.5)
    length.axhline(0.5, color=GREY, linestyle=":", label="guessing")
    calibrated.set(xlabel="predicted win rate", ylabel="observed win rate",
                   title=f"calibration error {result['calibration_error']:.3f}")
    length.set(xlabel="chosen - rejected (tokens)", ylabel="pairs ranked right",
               title=f"'the longer wins' ranks {result['length_baseline_accuracy']:.0%} right")
    for axes in (calibrated, length):
        axes.title.set_fontsize(10)
        axes.legend(frameon=False, fontsize=9)
    return named(figure, f"Reward model: calibration error {result['calibration_error']:.3f}; accuracy "
                  + ", ".join(f"{row['accuracy']:.2f} at {row['tokens']:+.0f} tokens"
                              for row in result["by_length_difference"]))


METHODS = {"best-of-n": (BLUE, "s", "--", "best-of-n"), "ppo": (ORANGE, "o", "-", "PPO")}
"""Colour, mark, line and name."""
STYLES = (("-", "o", BLUE), ("--", "s", GREEN), (":", "^", PINK))


def squared(d: float | None) -> str:
    """KL at the distance d, in words."""
    return "never" if d is None or d > 30 else f"{d * d:.2f}"


def curve_figure(found: dict) -> Figure:
    """Best-of-n and PPO under the reward models of the policy's size, one column for each amount of data: above what
    the reward model promises, below what is true."""
    columns: dict[str, list[dict]] = {}
    for row in found["curves"]:
        if row["width"] == found["curves"][0]["width"]:
            columns.setdefault(f"{row['pairs']} pairs, accuracy {fmean(row['accuracy']):.0%}", []).append(row)
    figure, axes = grid(2, len(columns), (9, 5.2), sharex=True, sharey="row")
    for (promised, true), (title, rows) in zip(axes.T, columns.items(), strict=True):
        for row in rows:
            colour, mark, style, name = METHODS[row["method"]]
            for points in row["points"]:
                for place, key in ((promised, "promise"), (true, "gold")):
                    place.plot(points["d"], points[key], mark, color=colour, markersize=3, alpha=0.6)
            _draw(true, row, colour, style, name)
        promised.set_title(title, fontsize=10)
        true.set_xlabel("d = sqrt(KL to the SFT model)")
    axes[0, 0].set_ylabel("gain promised by\nthe reward model")
    axes[1, 0].set_ylabel("gain in true reward")
    axes[1, 0].legend(frameon=False, fontsize=9)
    return named(figure, "Promised and true reward against distance: " + ", ".join(
        f"{row['method']} with {row['pairs']} pairs turns at KL {squared(row['turn'])}"
        for rows in columns.values() for row in rows))


def size_figure(found: dict) -> Figure:
    """Best-of-n and PPO under reward models of three sizes, taught by more or fewer pairs."""
    widths, methods = (list(dict.fromkeys(row[name] for row in found["curves"])) for name in ("width", "method"))
    figure, axes = grid(len(methods), len(widths), (9, 5.4), sharex=True, sharey="row")
    for place, (method, width) in zip(axes.flat, itertools.product(methods, widths), strict=True):
        rows = [row for row in found["curves"] if (row["width"], row["method"]) == (width, method)]
        for row, (style, mark, colour) in zip(rows, STYLES, strict=False):
            for points in row["points"]:
                place.plot(points["d"], points["gold"], mark, color=colour, markersize=3, alpha=0.6)
            _draw(place, row, colour, style, f"{row['pairs']} pairs")
        place.set_title(f"{METHODS[method][3]}, reward model {width} wide", fontsize=10)
    for place in axes[-1]:
        place.set_xlabel("d = sqrt(KL)")
    for place in axes[:, 0]:
        place.set_ylabel("gain in true reward")
    axes[0, 0].legend(frameon=False, fontsize=9)
    return named(figure, "True reward by size of the reward model and number of pairs")


def coefficient_figure(found: dict) -> Figure:
    """The fitted coefficients against the number of pairs, with 95 % intervals; a row of axes for each method."""
    widths, methods = (list(dict.fromkeys(row[name] for row in found["curves"])) for name in ("width", "method"))
    figure, axes = grid(len(methods), 2, (9, 5.4))
    for place, (method, name) in zip(axes.flat, itertools.product(methods, ("alpha", "beta")), strict=True):
        for number, (width, (style, mark, colour)) in enumerate(zip(widths, STYLES, strict=False)):
            rows = [row for row in found["curves"] if (row["method"], row["width"]) == (method, width)]
            middle = np.array([row[name] for row in rows])
            spread = np.abs(np.array([row[f"{name}_interval"] for row in rows]).T - middle)
            place.errorbar(np.array([row["pairs"] for row in rows]) * 1.06 ** number, middle, spread, color=colour,
                           linestyle=style, marker=mark, markersize=4, capsize=3, label=f"{width} wide")
        place.set_xscale("log", base=2)
        place.set_xticks(*[sorted({row["pairs"] for row in found["curves"]})] * 2)
        place.set_ylabel(f"{name}, {METHODS[method][3]}")
        place.set_xlabel("pairs that the reward model learned from")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return named(figure, "Coefficients alpha and beta by number of pairs")


FIGURES = {"overoptimisation": curve_figure, "overoptimisation-sizes": size_figure,
           "overoptimisation-coefficients": coefficient_figure}


def _draw(axes, row: dict, colour: str, style: str, label: str) -> None:
    """The fitted curve with its band, and a line where it turns."""
    axes.axhline(0, color="black", linewidth=0.8)
    axes.fill_between(row["grid"], *row["band"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(row["grid"], row["curve"], style, color=colour, linewidth=1.8, label=label)
    if row["turn"] is not None and 0 < row["turn"] < row["grid"][-1]:
        axes.axvline(row["turn"], color=colour, linestyle=":", linewidth=1.2)
        axes.annotate("stop", (row["turn"], 0), xycoords=("data", "axes fraction"), xytext=(3, 4), rotation=90,
                      textcoords="offset points", fontsize=8, color=colour)
