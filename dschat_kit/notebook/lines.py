"""From the raw output of a job to whole lines, and the few of them that a reader is shown."""
import re
import time
from collections import deque

LIBRARY = re.compile(
    r"""^\[\d{4}-\d\d-\d\d[ T][\d:.,]+\]\ \[[A-Z]+\]   # DeepSpeed: [2026-01-31 12:00:00,123] [INFO] ...
      | ^(\[rank\d+\]:\s?)?\[?[IWE]\d{4}\ [\d:.]+      # torch, glog: [W131 ...], W0131 12:00:00.000000 ...
      | ^\[?(INFO|DEBUG|WARNING)\b
      | ^[^\s:]+\.pyi?:\d+:\ \w*Warning:               # warnings.warn
      | ^\[Gloo\]\ Rank
      | ^(Setting\ ds_accelerator|Using\ .*torch_extensions|Loading\ extension\ module|ninja:\ no\ work)
      | ^(Detected\ VISIBLE_DEVICES|No\ module\ named\ 'triton'|Using\ quantizer)
      | ^\s*$""",
    re.VERBOSE,
)
WARNING = re.compile(r"^[^\s:]+\.pyi?:\d+: \w*Warning:")
LONGEST = 400  # characters shown of one line


class Lines:
    """Cuts bytes into whole lines. `feed` returns the complete ones, each with its newline; `rest` what was left."""

    def __init__(self, limit: int = 1 << 20):
        self.buffer, self.limit = b"", limit

    def feed(self, data: bytes) -> list[bytes]:
        """Complete lines after `data`; a line longer than `limit` bytes is cut so that memory stays bounded."""
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        lines = [line + b"\n" for line in whole]
        if len(self.buffer) > self.limit:
            lines.append(self.rest())
        return lines

    def rest(self) -> bytes:
        """The last, unfinished line with a newline added, b"" where there is none."""
        line, self.buffer = self.buffer, b""
        return line + b"\n" if line else b""


class View:
    """Chooses what is shown: the first lines at once, later ones ever more rarely, and always the last ones.

    After `first` lines the gap between two shown lines starts at `gap` seconds and doubles every `every` lines, so
    that an hour of output takes about `first + 350` lines. Lines of libraries are left to the log.
    """

    def __init__(self, first: int = 150, gap: float = 0.5, every: int = 50, last: int = 30):
        self.first, self.gap, self.every = first, gap, every
        self.shown, self.skipped, self.next_at = 0, 0, 0.0
        self.held: deque[str] = deque(maxlen=last)  # newest lines not shown so far
        self.after_warning = False

    def readable(self, raw: bytes) -> str:
        """The line as a person wants it, "" for one that belongs only in the log."""
        text = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]  # last state of a progress bar
        quoted = self.after_warning and text.startswith("  ")  # the source line under a warning
        self.after_warning = bool(WARNING.match(text))
        if quoted or LIBRARY.match(text):
            return ""
        return text if len(text) <= LONGEST else text[:LONGEST] + " ..."

    def add(self, raw: bytes) -> None:
        """Take one line; `due` says what to show."""
        if text := self.readable(raw):
            if len(self.held) == self.held.maxlen:
                self.skipped += 1
            self.held.append(text)

    def due(self, now: float | None = None) -> list[str]:
        """Lines to show at this moment: all while there are few, otherwise the newest when its time has come."""
        now = time.monotonic() if now is None else now
        if not self.held:
            return []
        if self.shown < self.first:
            lines = self._take(min(len(self.held), self.first - self.shown))
        elif now >= self.next_at:
            self.skipped += len(self.held) - 1
            lines = [self.held[-1]]
            self.held.clear()
        else:
            return []
        self.shown += len(lines)
        if self.shown >= self.first:
            self.next_at = now + self.gap * 2 ** ((self.shown - self.first) // self.every)
        return lines

    def finish(self, log: str, last: int = 8) -> list[str]:
        """The `last` lines still held, after a line that says how much was left out."""
        while len(self.held) > last:
            self.held.popleft()
            self.skipped += 1
        lines = [f"... ({self.skipped} lines not shown here{log})"] if self.skipped else []
        return lines + self._take(len(self.held))

    def _take(self, count: int) -> list[str]:
        return [self.held.popleft() for _ in range(count)]
