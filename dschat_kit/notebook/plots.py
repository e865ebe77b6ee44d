"""One matplotlib function a figure: numbers from a run folder in, a `matplotlib.figure.Figure` out (no pyplot).

`run` is a stage's folder (StageRun or path), `root` the folder of the whole pass. A stage that has written nothing yet
gives a figure that says so. `figure.get_label()` is a text for those who cannot see it.
"""
from pathlib import Path

from matplotlib.figure import Figure

from dschat_kit.metrics import read_metrics
from dschat_kit.notebook.show import bundle, png, samples_table, show
from dschat_kit.runs import StageRun, open_run

__all__ = ["blend_picture", "bundle", "chain_overview", "gold_parts", "png", "ppo_curves", "ppo_time_split",
           "reward_histogram", "reward_training", "samples_table", "sft_loss", "show", "token_lengths"]
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"
PARTS = (("generation", BLUE, "//"), ("scoring", ORANGE, ".."), ("training", GREEN, "\\\\"), ("other", GREY, ""))
STEP = "optimiser step"


def sft_loss(run) -> Figure:
    """Training loss of every step and the loss on held-out dialogues, in nats a token."""
    figure, (axes,) = _figure(1)
    rows = _metrics(run)
    _draw_sft(axes, rows)
    last = _last(rows, "eval_loss", "loss")
    return _named(figure, f"SFT: loss over {len(rows)} steps, last {last:.3g}" if rows else "SFT: no step yet")


def reward_training(run) -> Figure:
    """Loss, accuracy (share of pairs where the chosen answer scores higher) and margin of the reward model."""
    figure, (loss, accuracy, margin) = _figure(3)
    rows = _metrics(run)
    _lines(loss, rows, ("loss", BLUE, "-", "batch"))
    _label(loss, STEP, "pairwise loss (nats)")
    _draw_accuracy(accuracy, rows, _result(run))
    _lines(margin, rows, ("margin", GREEN, "-", "batch"))
    _label(margin, STEP, "score of chosen - rejected")
    label = f"Reward model: {len(rows)} steps, last accuracy {_last(rows, 'eval_accuracy', 'accuracy'):.2f}"
    return _named(figure, label if rows else "Reward model: no step yet")


def reward_histogram(run) -> Figure:
    """How the finished reward model scores chosen and rejected answers of held-out pairs."""
    figure, (axes,) = _figure(1)
    result = _result(run)
    histogram = result.get("score_histogram")
    if not histogram:
        return _named(_empty(figure, axes), "Reward scores: no result yet")
    for name, colour, style in (("chosen", BLUE, "-"), ("rejected", ORANGE, "--")):
        axes.stairs(histogram[name], histogram["edges"], fill=True, color=colour, alpha=0.2)
        axes.stairs(histogram[name], histogram["edges"], color=colour, linestyle=style, linewidth=2, label=name)
    low, high = result["accuracy_interval"]
    axes.set_title(f"chosen scores higher in {result['accuracy']:.1%} of pairs ({low:.1%} to {high:.1%})", fontsize=10)
    _label(axes, "score", "held-out answers")
    axes.legend(frameon=False)
    return _named(figure, f"Histogram of reward scores; accuracy {result['accuracy']:.2f}")


def ppo_curves(run) -> Figure:
    """Score, KL to the reference, response length and clip fraction over the rollouts of PPO."""
    figure, (score, kl, length, clipped) = _figure(2, 2)
    rows = _metrics(run)
    _draw_score(score, rows)
    _lines(kl, rows, ("kl", ORANGE, "-", ""))
    _label(kl, "rollout", "KL to reference (nats)")
    _lines(length, rows, ("response_length", GREEN, "-", ""))
    _label(length, "rollout", "response (tokens)")
    length.set_ylim(0, 1.2 * max(_points(rows, "response_length")[1] or [1]))  # else half a token looks like a change
    percent = [{"step": row["step"], "percent": 100 * (row.get("clip_fraction") or 0)} for row in rows]
    _lines(clipped, percent, ("percent", PINK, "-", ""))
    _label(clipped, "rollout", "clipped ratios (%)")
    clipped.set_ylim(0, max([1.0, *(1.1 * row["percent"] for row in percent)]))
    label = f"PPO: {len(rows)} rollouts, last score {_last(rows, 'score_mean'):.3g}, KL {_last(rows, 'kl'):.3g}"
    return _named(figure, label if rows else "PPO: no rollout yet")


def ppo_time_split(run) -> Figure:
    """Where an iteration's time goes: seconds of every rollout, and shares of the whole."""
    figure, (bars, shares) = _figure(2, widths=(2, 1))
    rows = _metrics(run)
    if not rows:
        return _named(_empty(figure, bars, shares), "PPO: no rollout yet")
    bottom, steps = [0.0] * len(rows), [row["step"] for row in rows]
    totals = {}
    for name, colour, hatch in PARTS:
        seconds = [row.get(f"seconds_{name}") or 0.0 for row in rows]
        totals[name], hatch = sum(seconds), hatch * (len(rows) <= 60)
        bars.bar(steps, seconds, 0.85, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, label=name)
        bottom = [low + high for low, high in zip(bottom, seconds, strict=True)]
    _label(bars, "rollout", "seconds")
    bars.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    whole = sum(totals.values()) or 1.0
    names = [name for name, *_ in PARTS]
    drawn = shares.barh(names, [100 * totals[name] / whole for name in names], color=[c for _, c, _ in PARTS],
                        hatch=[h for *_, h in PARTS], edgecolor="white", linewidth=0.3)
    shares.bar_label(drawn, [f"{totals[name] / whole:.0%}" for name in names], padding=3)
    shares.set_xlim(0, 118 * max(totals.values()) / whole)
    shares.invert_yaxis()
    _label(shares, "share of time (%)", "")
    return _named(figure, "Time of PPO: " + ", ".join(f"{name} {totals[name] / whole:.0%}" for name in names))


def chain_overview(root: str | Path) -> Figure:
    """The whole chain at a glance: SFT loss, reward accuracy, PPO score and KL, and gold where it is known."""
    sft, reward, ppo = (open_run(Path(root), stage) for stage in ("sft", "reward", "ppo"))
    figure, (loss, accuracy, score, last) = _figure(2, 2)
    _draw_sft(loss, _metrics(sft))
    loss.set_title("1  supervised fine-tuning", loc="left", fontsize=10)
    _draw_accuracy(accuracy, _metrics(reward), _result(reward))
    accuracy.set_title("2  reward model", loc="left", fontsize=10)
    rows, result = _metrics(ppo), _result(ppo)
    _draw_score(score, rows)
    score.set_title("3  PPO: what it optimises", loc="left", fontsize=10)
    if result.get("gold_before") is None:
        _lines(last, rows, ("kl", ORANGE, "--", ""))
        _label(last, "rollout", "KL to reference (nats)")
        last.set_title("... and how far it moves away", loc="left", fontsize=10)
    else:
        right = score.twinx()
        right.plot(*_points(rows, "kl"), color=ORANGE, linestyle="--", linewidth=1.8)
        right.set_ylabel("KL (nats), dashed", color=ORANGE)
        right.spines["top"].set_visible(False)
        drawn = last.barh(["before PPO", "after PPO"], [result["gold_before"], result["gold_after"]], 0.6,
                          color=[GREY, GREEN], hatch=["", "//"], edgecolor="white")
        last.bar_label(drawn, fmt="%.2f", padding=3)
        last.margins(x=0.15)
        last.invert_yaxis()
        _label(last, "mean gold reward on held-out prompts", "")
        last.set_title("4  what it never saw: the true reward", loc="left", fontsize=10)
    gold = ", gold {gold_before:.2f} to {gold_after:.2f}".format(**result) if result.get("gold_after") else ""
    return _named(figure, f"The chain: SFT loss, reward accuracy, PPO score{gold}")


def gold_parts(run) -> Figure:
    """Toy world: the parts of the known reward before and after PPO, means over held-out prompts."""
    figure, (axes,) = _figure(1)
    before, after = (_result(run).get(f"gold_parts_{phase}") for phase in ("before", "after"))
    if not before or not after:
        return _named(_empty(figure, axes), "Gold reward: no result yet")
    places = range(len(before))
    for shift, values, colour, hatch, name in ((-0.2, before, GREY, "", "before PPO"),
                                               (0.2, after, GREEN, "//", "after PPO")):
        drawn = axes.bar([place + shift for place in places], [values[part] for part in before], 0.38, color=colour,
                         hatch=hatch, edgecolor="white", label=name)
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(list(places), [part.replace("_", " ") for part in before])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    _label(axes, "", "mean part of gold reward")
    axes.grid(False, axis="x")
    axes.legend(frameon=False)
    return _named(figure, "Gold reward by part: " + ", ".join(f"{p} {before[p]:.2f} to {after[p]:.2f}" for p in before))


def blend_picture(data_run) -> Figure:
    """Which source gives how many training rows to which stage, and the blend that came out."""
    result = _result(data_run)
    figure, (axes,) = _figure(1)
    sources = result.get("rows")
    if not sources:
        return _named(_empty(figure, axes), "Data: no result yet")
    axes.figure.set_size_inches(9, 1.6 + 0.45 * len(sources))
    train = {name: sum(count for part, count in by.items() if part[-4:] != "eval") for name, by in sources.items()}
    names = [f"{_short(name)}  ({rows / (sum(train.values()) or 1):.0%})" for name, rows in train.items()]
    left, stages = [0] * len(sources), list(dict.fromkeys(stage for by in sources.values() for stage in by))
    for number, stage in enumerate(stages):
        _, colour, hatch = PARTS[number % len(PARTS)]
        counts = [by.get(stage, 0) for by in sources.values()]
        drawn = axes.barh(names, counts, 0.6, left, color=colour, hatch=hatch, edgecolor="white",
                          label={"eval": "held out", "ptx_eval": "text held out"}.get(stage, stage))
        axes.bar_label(drawn, [str(count) if count else "" for count in counts], label_type="center", fontsize=9,
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
        left = [low + count for low, count in zip(left, counts, strict=True)]
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    _label(axes, "rows", "")
    axes.legend(frameon=False, ncols=len(stages), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _named(figure, "Rows by source and stage: "
                  + ", ".join(f"{name} {total}" for name, total in zip(sources, left, strict=True)))


def token_lengths(data_run) -> Figure:
    """Tokens of prompts, chosen and rejected answers of the reward stage: median and 95th percentile."""
    figure, (axes,) = _figure(1)
    lengths = _result(data_run).get("tokens", {}).get("reward")
    if not lengths:
        return _named(_empty(figure, axes), "Token lengths: no result yet")
    for number, (name, values) in enumerate(lengths.items()):
        _, colour, hatch = PARTS[number]
        drawn = axes.barh([name], [values["median"]], 0.6, color=colour, hatch=hatch, edgecolor="white",
                          xerr=[[0], [values["p95"] - values["median"]]], capsize=4)
        axes.bar_label(drawn, [f"{values['median']:.0f}"], label_type="center",
                       bbox={"facecolor": "white", "edgecolor": "none"})
    axes.invert_yaxis()
    _label(axes, "tokens: median, and the line to the 95th percentile", "")
    return _named(figure, "Tokens: " + ", ".join(f"{name} median {v['median']:.0f}" for name, v in lengths.items()))


def _figure(columns: int, lines: int = 1, widths=None):
    figure = Figure(figsize=(9, 3 if lines == 1 else 4.8), dpi=100, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.08)
    axes = figure.subplots(lines, columns, squeeze=False, width_ratios=widths)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, color="#E5E5E5", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, list(axes.flat)


def _named(figure: Figure, text: str) -> Figure:
    figure.set_label(text)
    return figure


def _empty(figure: Figure, *axes) -> Figure:
    for one in axes:
        one.text(0.5, 0.5, "nothing yet", ha="center", va="center", transform=one.transAxes, color=GREY)
    return figure


def _label(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _points(rows: list[dict], key: str) -> tuple[list, list]:
    kept = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    return [step for step, _ in kept], [value for _, value in kept]


def _lines(axes, rows: list[dict], *curves) -> None:
    """Draw curves (key, colour, line style, label); few points get markers, many become dots and a running mean."""
    if not rows:
        _empty(axes.figure, axes)
    for key, colour, style, label in curves:
        steps, values = _points(rows, key)
        if len(steps) > 100:
            axes.scatter(steps, values, 3, color=colour, alpha=0.35, linewidths=0)
            half = len(steps) // 80
            near = [values[max(0, i - half):i + half + 1] for i in range(len(steps))]
            values, label = [sum(some) / len(some) for some in near], label and f"{label} (mean of {2 * half + 1})"
        axes.plot(steps, values, color=colour, linestyle=style, label=label or None, linewidth=1.8,
                  marker="o" if len(steps) <= 30 else "", markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if rows and any(label for *_, label in curves):
        axes.legend(frameon=False, fontsize=9)


def _draw_sft(axes, rows: list[dict]) -> None:
    _lines(axes, rows, ("loss", BLUE, "-", "batch"), ("eval_loss", ORANGE, "--", "held out"))
    values = _points(rows, "loss")[1] or [1]
    if 0 < 4 * min(values) < max(values):  # else the plateau after a steep fall cannot be read
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
    _label(axes, STEP, f"loss (nats per token{', log' * (axes.get_yscale() == 'log')})")


def _draw_accuracy(axes, rows: list[dict], result: dict) -> None:
    percent = [{"step": row["step"], **{key: 100 * row[key] for key in ("accuracy", "eval_accuracy")
                                        if isinstance(row.get(key), (int, float))}} for row in rows]
    _lines(axes, percent, ("accuracy", BLUE, "-", "batch"), ("eval_accuracy", ORANGE, "--", "held out"))
    _label(axes, STEP, "pairs ranked right (%)")
    if rows:
        axes.axhline(50, color=GREY, linestyle=":", linewidth=1.5, label="guessing")
        if "bayes_accuracy" in result:
            axes.axhline(100 * result["bayes_accuracy"], color=GREEN, linestyle="-.", label="best possible")
        axes.legend(fontsize=8, loc="lower right", framealpha=0.9, edgecolor="white")


def _draw_score(axes, rows: list[dict]) -> None:
    _lines(axes, rows, ("score_mean", BLUE, "-", ""))
    steps, mean = _points(rows, "score_mean")
    _, spread = _points(rows, "score_std")
    if len(spread) == len(mean) and mean:
        axes.fill_between(steps, [m - s for m, s in zip(mean, spread, strict=True)],
                          [m + s for m, s in zip(mean, spread, strict=True)], color=BLUE, alpha=0.15, linewidth=0)
    _label(axes, "rollout", "score (mean, 1 std)")


def _short(name: str) -> str:
    return name if len(name) <= 34 else "..." + name[-31:]


def _last(rows: list[dict], *keys: str) -> float:
    for key in keys:
        if values := _points(rows, key)[1]:
            return values[-1]
    return float("nan")


def _metrics(run) -> list[dict]:
    return read_metrics(StageRun(getattr(run, "path", run)).metrics_path)


def _result(run) -> dict:
    run = StageRun(getattr(run, "path", run))
    return run.result if (run.path / "result.json").exists() else {}
