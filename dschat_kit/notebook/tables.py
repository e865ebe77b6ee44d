"""Small tables of a notebook: facts with their numbers, rows side by side, a browser of records."""

import html
import os
from collections.abc import Sequence

from dschat_kit.notebook.show import Table

__all__ = ["browse", "facts", "table"]

_CELL = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere">{}</td>'


def facts(values: dict) -> Table:
    """Two columns, what it is and its value; a nested dictionary is written on one line."""
    return table([{"what": name, "value": _text(value)} for name, value in values.items()], wide=False)


def table(rows: list[dict], wide: bool = True) -> Table:
    """One line a row, one column a key; wide tables share the width evenly. Texts are escaped, never interpreted."""
    if not rows:
        return Table("<p>nothing yet</p>", "nothing yet")
    head = "".join(f'<th style="text-align:left">{html.escape(str(name))}</th>' for name in rows[0])
    lines = ("".join(_CELL.format(html.escape(str(value))) for value in row.values()) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    style = 'class="tex2jax_ignore"' + (' style="width:100%;table-layout:fixed"' if wide else ' style="margin-left:0"')
    text = "\n\n".join("\n".join(f"{name}: {value}" for name, value in row.items()) for row in rows) if wide else \
        "\n".join("  ".join(map(str, row.values())) for row in rows)
    return Table(f"<table {style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", text)


def browse(rows: Sequence[dict], columns: tuple[str, ...] = ("sample_id", "prompt", "chosen", "rejected")):
    """A slider over records (its number can be typed too); without a front end the first three as a table."""
    def record(number: int) -> Table:
        row = rows[int(number)]
        return table([{"column": name, "text": str(row[name]).strip()} for name in columns if name in row], wide=False)

    if "DSCHAT_HEADLESS" in os.environ:
        first = [rows[i] for i in range(min(3, len(rows)))]
        return table([{name: str(row[name]).strip() for name in columns if name in row} for row in first])
    from IPython.display import display
    from ipywidgets import IntSlider, interactive_output
    slider = IntSlider(0, 0, len(rows) - 1, description="record", layout={"width": "60%"})
    display(slider, interactive_output(lambda number: display(record(number)), {"number": slider}))
    return None


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or "none"
    return str(value)
