"""One matplotlib function a figure: numbers from a run folder in, a `matplotlib.figure.Figure` out (no pyplot).

`run` is a stage's folder (StageRun or path), `root` that of a pass; `figure.get_label()` says what the figure shows.
"""
from pathlib import Path

from matplotlib.figure import Figure

from dschat_kit.metrics import read_metrics
from dschat_kit.notebook.tables import grid, named, show  # noqa: F401  a notebook says plots.show(figure)
from dschat_kit.runs import StageRun, open_run

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"
PARTS = (("generation", BLUE, "//"), ("scoring", ORANGE, ".."), ("training", GREEN, "\\\\"), ("other", GREY, ""))
STEP = "optimiser step"


def sft_loss(run) -> Figure:
    """Training loss of every step and the loss on held-out dialogues, in nats a token."""
    figure, (axes,) = _figure(1)
    rows = _metrics(run)
    _draw_sft(axes, rows)
    last = _last(rows, "eval_loss", "loss")
    return named(figure, f"SFT: loss over {len(rows)} steps, last {last:.3g}" if rows else "SFT: no step yet")


def reward_training(run) -> Figure:
    """Loss, accuracy (share of pairs where the chosen answer scores higher) and margin of the reward model."""
    figure, (loss, accuracy, margin) = _figure(3)
    rows = _metrics(run)
    _curves(loss, rows, STEP, "pairwise loss (nats)", ("loss", BLUE, "-", "batch"))
    _draw_accuracy(accuracy, rows, result_of(run))
    _curves(margin, rows, STEP, "score of chosen - rejected", ("margin", GREEN, "-", "batch"))
    label = f"Reward model: {len(rows)} steps, last accuracy {_last(rows, 'eval_accuracy', 'accuracy'):.2f}"
    return named(figure, label if rows else "Reward model: no step yet")


def reward_histogram(run) -> Figure:
    """How the finished reward model scores chosen and rejected answers of held-out pairs."""
    figure, (axes,) = _figure(1)
    result = result_of(run)
    histogram = result.get("score_histogram")
    if not histogram:
        return named(empty(figure, axes), "Reward scores: no result yet")
    for name, colour, style in (("chosen", BLUE, "-"), ("rejected", ORANGE, "--")):
        axes.stairs(histogram[name], histogram["edges"], fill=True, facecolor=(colour, 0.2), edgecolor=colour,
                    linestyle=style, linewidth=2, label=name)
    low, high = result["accuracy_interval"]
    axes.set_title(f"chosen scores higher in {result['accuracy']:.1%} of pairs ({low:.1%} to {high:.1%})", fontsize=10)
    axes.set(xlabel="score", ylabel="held-out answers")
    axes.legend(frameon=False)
    return named(figure, f"Histogram of reward scores; accuracy {result['accuracy']:.2f}")


def ppo_curves(run) -> Figure:
    """Score, KL to the reference, response length and clip fraction over the rollouts of PPO."""
    figure, (score, kl, length, clipped) = _figure(2, 2)
    rows = _metrics(run)
    _draw_score(score, rows)
    _curves(kl, rows, "rollout", "KL to reference (nats)", ("kl", ORANGE, "-", ""))
    _curves(length, rows, "rollout", "response (tokens)", ("response_length", GREEN, "-", ""))
    length.set_ylim(0, 1.2 * max(_points(rows, "response_length")[1] or [1]))  # else half a token looks like a change
    _curves(clipped, rows, "rollout", "clipped ratios", ("clip_fraction", PINK, "-", ""))
    clipped.set_ylim(0, 1.1 * max([0.01, *_points(rows, "clip_fraction")[1]]))
    clipped.yaxis.set_major_formatter("{x:.1%}")
    label = f"PPO: {len(rows)} rollouts, last score {_last(rows, 'score_mean'):.3g}, KL {_last(rows, 'kl'):.3g}"
    return named(figure, label if rows else "PPO: no rollout yet")


def ppo_time_split(run) -> Figure:
    """Where an iteration's time goes: seconds of every rollout, and shares of the whole."""
    figure, (bars, shares) = _figure(2, widths=(2, 1))
    rows = _metrics(run)
    if not rows:
        return named(empty(figure, bars, shares), "PPO: no rollout yet")
    seconds = {name: [row.get(f"seconds_{name}") or 0.0 for row in rows] for name, *_ in PARTS}
    _stacked(bars.bar, [row["step"] for row in rows], seconds, hatched=len(rows) <= 60)
    bars.set(xlabel="rollout", ylabel="seconds")
    bars.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    whole = sum(map(sum, seconds.values())) or 1.0
    share = {name: sum(values) / whole for name, values in seconds.items()}
    drawn = shares.barh(list(share), list(share.values()), color=[colour for _, colour, _ in PARTS],
                        hatch=[hatch for *_, hatch in PARTS], edgecolor="white", linewidth=0.3)
    shares.bar_label(drawn, fmt="{:.0%}", padding=3)
    shares.margins(x=0.2)
    shares.xaxis.set_major_formatter("{x:.0%}")
    shares.invert_yaxis()
    shares.set_xlabel("share of time")
    return named(figure, "Time of PPO: " + ", ".join(f"{name} {part:.0%}" for name, part in share.items()))


def engine_time_split(found: dict) -> Figure:
    """Seconds of an iteration by phase, for each engine of `dschat bench ppo --json`."""
    figure, (axes,) = _figure(1)
    engines = {name: found["engines"][key]["phases"] for name, key in (("ours", "kit"), ("plain transformers", "hf"))}
    _stacked(axes.barh, list(engines), {part: [one[part] for one in engines.values()] for part in engines["ours"]})
    axes.bar_label(axes.containers[-1], [f"{sum(one.values()):.2f} s" for one in engines.values()], padding=4)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set_xlabel("seconds an iteration (median)")
    return named(figure, f"Time of an iteration: ours {found['ratio_to_hf']:.2f} times as fast as plain transformers")


def chain_overview(root: str | Path) -> Figure:
    """The whole chain at a glance: SFT loss, reward accuracy, PPO score and KL, and gold where it is known."""
    sft, reward, ppo = (open_run(Path(root), stage) for stage in ("sft", "reward", "ppo"))
    figure, (loss, accuracy, score, last) = _figure(2, 2)
    rows, result = _metrics(ppo), result_of(ppo)
    _draw_sft(loss, _metrics(sft))
    _draw_accuracy(accuracy, _metrics(reward), result_of(reward))
    _draw_score(score, rows)
    titles = ["1  supervised fine-tuning", "2  reward model", "3  PPO: what it optimises"]
    if result.get("gold_before") is None:
        _curves(last, rows, "rollout", "KL to reference (nats)", ("kl", ORANGE, "--", ""))
        titles.append("... and how far it moves away")
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
        last.set_xlabel("mean gold reward on held-out prompts")
        titles.append("4  what it never saw: the true reward")
    for axes, title in zip((loss, accuracy, score, last), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
    gold = ", gold {gold_before:.2f} to {gold_after:.2f}".format(**result) if result.get("gold_after") else ""
    return named(figure, f"The chain: SFT loss, reward accuracy, PPO score{gold}")


def gold_parts(run) -> Figure:
    """Toy world: the parts of the known reward before and after PPO, means over held-out prompts."""
    figure, (axes,) = _figure(1)
    result = result_of(run)
    before, after = (result.get(f"gold_parts_{phase}") for phase in ("before", "after"))
    if not before or not after:
        words = "the true reward of this data is not known" if result else "nothing yet"
        return named(empty(figure, axes, words=words), f"Gold reward: {words}")
    drawn = axes.grouped_bar({"before PPO": list(before.values()), "after PPO": [after[part] for part in before]},
                             tick_labels=[part.replace("_", " ") for part in before], colors=[GREY, GREEN],
                             group_spacing=0.5, edgecolor="white")
    for bars, hatch in zip(drawn.bar_containers, ("", "//"), strict=True):
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        for bar in bars:
            bar.set_hatch(hatch)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_ylabel("mean part of gold reward")
    axes.grid(False, axis="x")
    axes.legend(frameon=False)
    return named(figure, "Gold reward by part: " + ", ".join(f"{p} {before[p]:.2f} to {after[p]:.2f}" for p in before))


def blend_picture(data_run) -> Figure:
    """Which source gives how many training rows to which stage, and the blend that came out."""
    result = result_of(data_run)
    figure, (axes,) = _figure(1)
    sources = result.get("rows")
    if not sources:
        return named(empty(figure, axes), "Data: no result yet")
    figure.set_size_inches(9, 1.6 + 0.45 * len(sources))
    train = [sum(count for part, count in by.items() if part[-4:] != "eval") for by in sources.values()]
    short = [name if len(name) <= 34 else "..." + name[-31:] for name in sources]
    names = [f"{name}  ({rows / (sum(train) or 1):.0%})" for name, rows in zip(short, train, strict=True)]
    stages = list(dict.fromkeys(stage for by in sources.values() for stage in by))
    words = {"eval": "held out", "ptx_eval": "text held out"}
    counts = {words.get(stage, stage): [by.get(stage, 0) for by in sources.values()] for stage in stages}
    for drawn in _stacked(axes.barh, names, counts):
        axes.bar_label(drawn, [str(int(count)) if count else "" for count in drawn.datavalues], fontsize=9,
                       label_type="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("rows")
    axes.legend(frameon=False, ncols=len(stages), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return named(figure, "Rows by source and stage: "
                  + ", ".join(f"{name} {sum(by.values())}" for name, by in sources.items()))


def token_lengths(data_run) -> Figure:
    """Tokens of prompts, chosen and rejected answers of the reward stage: median and 95th percentile."""
    figure, (axes,) = _figure(1)
    lengths = result_of(data_run).get("tokens", {}).get("reward")
    if not lengths:
        return named(empty(figure, axes), "Token lengths: no result yet")
    medians = [values["median"] for values in lengths.values()]
    above = [values["p95"] - values["median"] for values in lengths.values()]
    drawn = axes.barh(list(lengths), medians, 0.6, xerr=[[0] * len(above), above], capsize=4, edgecolor="white",
                      color=[BLUE, ORANGE, GREEN], hatch=["//", "..", "\\\\"])
    axes.bar_label(drawn, fmt="%.0f", label_type="center", bbox={"facecolor": "white", "edgecolor": "none"})
    axes.invert_yaxis()
    axes.set_xlabel("tokens: median, and the line to the 95th percentile")
    return named(figure, "Tokens: " + ", ".join(f"{name} median {v['median']:.0f}" for name, v in lengths.items()))


def _figure(columns: int, lines: int = 1, widths=None):
    figure, axes = grid(lines, columns, (9, 3 if lines == 1 else 4.8), width_ratios=widths)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.08)
    return figure, list(axes.flat)


def empty(figure: Figure, *axes, words: str = "nothing yet") -> Figure:
    """The figure, whose axes say that there is nothing so far, or why there will be nothing."""
    for one in axes:
        one.text(0.5, 0.5, words, ha="center", va="center", transform=one.transAxes, color=GREY)
    return figure


def _stacked(bar, places: list, series: dict[str, list[float]], hatched: bool = True) -> list:
    """Draw one series on top of the other with axes.bar or axes.barh, each with a colour and hatch of PARTS."""
    base, drawn = [0.0] * len(places), []
    for number, (name, values) in enumerate(series.items()):
        _, colour, hatch = PARTS[number % len(PARTS)]
        drawn.append(bar(places, values, 0.7, base, color=colour, hatch=hatch if hatched else "", edgecolor="white",
                         linewidth=0.3, label=name))
        base = [low + high for low, high in zip(base, values, strict=True)]
    return drawn


def _points(rows: list[dict], key: str) -> tuple[list, list]:
    kept = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    return [step for step, _ in kept], [value for _, value in kept]


def _curves(axes, rows: list[dict], x: str, y: str, *curves) -> None:
    """Draw curves (key, colour, line style, label); few points get markers, many become dots and a running mean."""
    if not rows:
        empty(axes.figure, axes)
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
    axes.set(xlabel=x, ylabel=y)


def _draw_sft(axes, rows: list[dict]) -> None:
    values = _points(rows, "loss")[1] or [1]
    steep = 0 < 4 * min(values) < max(values)  # then the plateau after the fall can be read on a logarithmic axis alone
    _curves(axes, rows, STEP, f"loss (nats per token{', log' * steep})", ("loss", BLUE, "-", "batch"),
            ("eval_loss", ORANGE, "--", "held out"))
    if steep:
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")


def _draw_accuracy(axes, rows: list[dict], result: dict) -> None:
    _curves(axes, rows, STEP, "pairs ranked right", ("accuracy", BLUE, "-", "batch"),
            ("eval_accuracy", ORANGE, "--", "held out"))
    axes.yaxis.set_major_formatter("{x:.0%}")
    if rows:
        axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1.5, label="guessing")
        if "bayes_accuracy" in result:
            axes.axhline(result["bayes_accuracy"], color=GREEN, linestyle="-.", label="best possible")
        axes.legend(fontsize=8, loc="lower right", framealpha=0.9, edgecolor="white")


def _draw_score(axes, rows: list[dict]) -> None:
    _curves(axes, rows, "rollout", "score (mean, 1 std)", ("score_mean", BLUE, "-", ""))
    band = [row for row in rows if None not in (row.get("score_mean"), row.get("score_std"))]
    axes.fill_between([row["step"] for row in band], [row["score_mean"] - row["score_std"] for row in band],
                      [row["score_mean"] + row["score_std"] for row in band], color=BLUE, alpha=0.15, linewidth=0)


def _last(rows: list[dict], *keys: str) -> float:
    """The newest value of the first of `keys` that has one."""
    return next((values[-1] for key in keys if (values := _points(rows, key)[1])), float("nan"))


def _metrics(run) -> list[dict]:
    return read_metrics(StageRun(getattr(run, "path", run)).metrics_path)


def result_of(run) -> dict:
    """result.json of a stage; {} where there is none."""
    run = StageRun(getattr(run, "path", run))
    return run.result if (run.path / "result.json").exists() else {}
