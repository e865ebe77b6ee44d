"""Figures and samples as a notebook displays them: pictures with a text alternative, answers side by side."""
import html
import io
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


def samples_table(run, n: int = 6) -> Table:
    """The first `n` held-out prompts with their answers before and after PPO and both scores, side by side."""
    pairs: dict[str, dict[str, dict]] = {}
    for row in read_metrics((run if isinstance(run, StageRun) else StageRun(run)).samples_path):
        if row.get("phase") in ("before", "after"):
            pairs.setdefault(row["sample_id"], {})[row["phase"]] = row
    chosen = [pair for pair in pairs.values() if len(pair) == 2][:n]
    cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere">{}</td>'
    lines, body = [], ""
    for pair in chosen:
        texts = [_asked(pair["before"]["prompt"])]
        body += "<tr>" + cell.format(html.escape(texts[0]))
        for phase in ("before", "after"):
            said, scores = pair[phase]["response"].strip() or "(nothing)", _scores(pair[phase])
            texts.append(f"{said}\n{scores}")
            body += cell.format(f'{html.escape(said)}<br><small style="opacity:0.7">{html.escape(scores)}</small>')
        body += "</tr>"
        lines += [f"{name:7} {text}".replace("\n", "\n        ") for name, text in zip(
            ("prompt", "before", "after"), texts, strict=True)] + [""]
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in ("prompt", "before PPO", "after PPO"))
    if not chosen:
        return Table("<p>no samples yet</p>", "no samples yet")
    style = 'class="tex2jax_ignore" style="width:100%;table-layout:fixed"'  # a $ in an answer is no formula
    table = f"<table {style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return Table(table, "\n".join(lines).rstrip())


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white, readable in a dark theme too."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    return buffer.getvalue()


def bundle(figure: Figure, alt: str = "") -> tuple[dict, dict]:
    """Data and metadata for IPython's display: the PNG and, for who cannot see it, a text."""
    alt = alt or figure.get_label()
    return {"image/png": png(figure), "text/plain": alt}, {"image/png": {"alt": alt}}


def show(figure: Figure, alt: str = "") -> None:
    """Display the figure in a notebook as a picture with a text alternative."""
    from IPython.display import display
    data, metadata = bundle(figure, alt)
    display(data, metadata=metadata, raw=True)


def _asked(prompt: str) -> str:
    """The dialogue without its last line, where that only names who speaks next."""
    dialogue, _, last = prompt.strip().rpartition("\n")
    return dialogue.strip() if dialogue and last.endswith(":") else prompt.strip()


def _scores(row: dict) -> str:
    return "  ".join(f"{key} {row[key]:.2f}" for key in ("score", "gold") if isinstance(row.get(key), (int, float)))
