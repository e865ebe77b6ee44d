"""Which lines of a job's output a reader is shown."""
import re
import time
from collections import deque

LIBRARY = re.compile(
    r"""^\[\d{4}-\d\d-\d\d[ T][\d:.,]+\]\ \[[A-Z]+\]   # DeepSpeed: [2026-01-31 12:00:00,123] [INFO] ...
      | ^(\[rank\d+\]:\s?)?\[?[IWE]\d{4}\ [\d:.]+      # torch, glog: [W131 ...], W0131 12:00:00.000000 ...
      | ^\[?(INFO|DEBUG|WARNING)\b
      | ^(?P<warning>[^\s:]+\.pyi?:\d+:\ \w*Warning:)  # warnings.warn
      | ^\[Gloo\]\ Rank
      | ^(Setting\ ds_accelerator|Using\ .*torch_extensions|Loading\ extension\ module|ninja:\ no\ work)
      | ^(Detected\ VISIBLE_DEVICES|No\ module\ named\ 'triton'|Using\ quantizer)
      | ^\s*$""",
    re.VERBOSE,
)
LONGEST = 400  # characters shown of one line


class View:
    """Chooses what is shown: the first lines at once, later ones ever more rarely, and always the last ones.

    After `first` lines the newest is shown whenever 2 % of the time so far have passed, so that an hour of output
    takes about `first + 300` lines. Lines of libraries are left to the log.
    """

    def __init__(self, first: int = 150, last: int = 20):
        self.first, self.added, self.shown = first, 0, 0
        self.held: deque[str] = deque(maxlen=last)  # newest lines not shown so far
        self.begun, self.next_at, self.after_warning = None, 0.0, False

    def add(self, raw: bytes) -> None:
        """Take one line; `due` says what to show."""
        text = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]  # last state of a progress bar
        quoted = self.after_warning and text.startswith("  ")  # the source line under a warning
        library = LIBRARY.match(text)
        self.after_warning = bool(library and library["warning"])
        if not quoted and not library:
            self.added += 1
            self.held.append(text if len(text) <= LONGEST else text[:LONGEST] + " ...")

    def due(self, now: float | None = None) -> str:
        """The line to show at this moment, "" for none; ask again until then."""
        now = time.monotonic() if now is None else now
        self.begun = now if self.begun is None else self.begun
        few = self.shown < self.first
        if not self.held or not few and now < self.next_at:
            return ""
        line = self.held.popleft() if few else self.held.pop()
        if not few:
            self.held.clear()
        self.shown += 1
        self.next_at = now + max(0.5, 0.02 * (now - self.begun))
        return line

    def rest(self, where: str) -> list[str]:
        """The last lines, after one that says how many were left out and `where` they are."""
        skipped = self.added - self.shown - len(self.held)
        return [f"... ({skipped} lines not shown here{where})"] * bool(skipped) + list(self.held)
