"""metrics.jsonl and samples.jsonl: one flushed JSON object a line; readers tolerate a half-written last line."""

import json
import math
from pathlib import Path

from dschat_kit.runs import cannot


class JsonlWriter:
    """Appends objects to a JSON-lines file. A NaN or infinity is written as null; a full disk is a RunError."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)

    def write(self, row: dict) -> None:
        """One object as one whole line, with the file before any reader looks again."""
        line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line):]
        except OSError as error:
            raise cannot(f"write {self._file.name}", error) from error

    def close(self) -> None:
        """Release the file; every line is on it already."""
        self._file.close()


class MetricsTail:
    """Reads what has been added to a JSON-lines file since the last look; an absent file has no lines yet."""

    def __init__(self, path: Path):
        self.path, self._offset = Path(path), 0

    def poll(self) -> list[dict]:
        """New complete lines as objects. A file that became shorter (a new run) is read from its beginning."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.split(b"\n") if line.strip()]  # text may hold other line breaks


def read_metrics(path: Path) -> list[dict]:
    """All complete lines of a JSON-lines file."""
    return MetricsTail(path).poll()


def truncate_after(path: Path, step: int) -> None:
    """Cut the lines of steps above `step` (0: all lines) and a half-written one off the end, so that a resumed run
    writes no step twice. What stays is not written anew."""
    kept = 0
    if path.exists():
        with open(path, "r+b") as file:
            for line in file:
                if not (step and line.endswith(b"\n") and json.loads(line).get("step", 0) <= step):
                    break
                kept += len(line)
            file.truncate(kept)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
