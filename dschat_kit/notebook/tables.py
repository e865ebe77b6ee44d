"""What a notebook displays: figures with a text alternative, facts, rows and answers side by side, a browser."""

import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from dschat_kit.metrics import read_metrics
from dschat_kit.runs import StageRun


@dataclass(frozen=True)
class Table:
    """A table that a notebook shows as HTML and a terminal as text."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def grid(lines: int, columns: int, size: tuple[float, float], **how):
    """A figure of `size` inches and its (lines, columns) axes, as all of ours look."""
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, **how)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, color="#E5E5E5", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def named(figure: Figure, text: str) -> Figure:
    """The figure with its text for those who cannot see it."""
    figure.set_label(text)
    return figure


def show(figure: Figure) -> None:
    """Display the figure in a notebook as a picture with a text alternative."""
    from IPython.display import display
    data, metadata = bundle(figure)
    display(data, metadata=metadata, raw=True)


def bundle(figure: Figure) -> tuple[dict, dict]:
    """Data and metadata for IPython's display: a PNG on white, readable in a dark theme too, and the label as text."""
    buffer, text = io.BytesIO(), figure.get_label()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    return {"image/png": buffer.getvalue(), "text/plain": text}, {"image/png": {"alt": text}}


def facts(values: dict) -> Table:
    """Two columns, what it is and its value; a nested dictionary is written on one line."""
    return table([{"what": name, "value": _text(value)} for name, value in values.items()], wide=False)


def table(rows: list[dict], wide: bool = True) -> Table:
    """One line a row, one column a key; wide tables share the width evenly. Texts are escaped, never interpreted."""
    if not rows:
        return Table("<p>nothing yet</p>", "nothing yet")
    cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere">{}</td>'
    head = "".join(f'<th style="text-align:left">{html.escape(str(name))}</th>' for name in rows[0])
    lines = ("".join(cell.format(html.escape(str(value))) for value in row.values()) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    style = "width:100%;table-layout:fixed" if wide else "margin-left:0"
    text = "\n\n".join("\n".join(f"{name}: {value}" for name, value in row.items()) for row in rows) if wide else \
        "\n".join("  ".join(map(str, row.values())) for row in rows)
    return Table(f'<table class="tex2jax_ignore" style="{style}">'  # a $ in an answer is no formula
                 f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", text)


def samples_table(run: StageRun, n: int = 6) -> Table:
    """The first `n` held-out prompts with their answers before and after PPO and both scores, side by side."""
    rows: dict[str, dict[str, str]] = {}
    for sample in read_metrics(run.samples_path):
        if sample.get("phase") in ("before", "after"):
            scores = [f"{key} {sample[key]:.2f}" for key in ("score", "gold") if sample.get(key) is not None]
            answer = sample["response"].strip() or "(nothing)"
            asked = re.sub(r"\n[^\n]*:\s*$", "", sample["prompt"]).strip()  # without the line that says who speaks next
            row = rows.setdefault(sample["sample_id"], {"prompt": asked})
            row[f"{sample['phase']} PPO"] = "\n".join([answer, "  ".join(scores)])
    return table([row for row in rows.values() if len(row) == 3][:n])


def browse(rows: Sequence[dict], columns: tuple[str, ...] = ("sample_id", "prompt", "chosen", "rejected")):
    """A slider over records (its number can be typed too); without a front end the first three as a table."""
    def record(number: int) -> dict[str, str]:
        return {name: str(rows[number][name]).strip() for name in columns if name in rows[number]}

    if "DSCHAT_HEADLESS" in os.environ or len(rows) == 0:
        return table([record(number) for number in range(min(3, len(rows)))])
    from IPython.display import display
    from ipywidgets import IntSlider, interactive_output
    slider = IntSlider(0, 0, len(rows) - 1, description="record", layout={"width": "60%"})
    display(slider, interactive_output(lambda number: display(facts(record(number))), {"number": slider}))
    return None


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or "none"
    return str(value)
