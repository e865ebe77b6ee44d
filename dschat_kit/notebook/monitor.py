"""A live view of a training that reads the run folder only: in JupyterLab beside a `%%bash` cell, or in a terminal.

The figure goes through a display handle, so its last state stays in the saved notebook; widgets, which do not, carry
only the progress bar.
"""
import os
import sys
import threading
import time
from pathlib import Path

from dschat_kit.notebook import plots
from dschat_kit.notebook.progress import ENDED, Follow, Line, Snapshot, bar
from dschat_kit.runs import RunError

STYLES = {"finished": "success", "failed": "danger", "interrupted": "warning"}
FIGURES = {"sft": plots.sft_loss, "reward": plots.reward_training, "dpo": plots.reward_training,
           "ppo": plots.ppo_curves}


class Watch:
    """The handle of a live view. `stop()` draws the last state, ends it and raises what went wrong in its thread."""

    def __init__(self, place, every: float = 3.0):
        self.follow, self.every = Follow(place), every
        self.error: Exception | None = None
        self._drawn, self._stop = None, threading.Event()
        self._show()
        self.thread = threading.Thread(target=self._work, name="dschat live view", daemon=True)
        self.thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End the live view now; what it shows stays. Raises the error that ended its thread, if one did."""
        self._stop.set()
        self.thread.join(timeout)
        if self.error is not None:
            raise self.error

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_exc) -> None:
        self.stop()

    def _show(self) -> None:
        """Put bar and picture into the running cell; later updates reach them from the thread."""
        from IPython.display import DisplayHandle, display
        self.bar = self.note = None
        if "DSCHAT_HEADLESS" not in os.environ:
            from ipywidgets import FloatProgress, HBox, Label
            self.bar = FloatProgress(min=0, max=1, layout={"flex": "0 0 300px"})
            self.note = Label(self.follow.poll().text())
            display(HBox([self.bar, self.note]))
        self.handle = DisplayHandle()
        self.handle.display(self._words(self.follow.poll()), raw=True)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                begun = time.monotonic()
                self._update()
                if self.follow.over:
                    break
                self._stop.wait(max(self.every, 5 * (time.monotonic() - begun)))  # the ranks need the cores more
            self._update()
        except Exception as error:  # noqa: BLE001  shown at once, raised again by stop()
            self.error = error
            self.handle.update({"text/plain": f"the live view ended: {type(error).__name__}: {error}"}, raw=True)

    def _update(self) -> None:
        look = self.follow.poll()
        if self.bar is not None:
            self.bar.value, self.note.value = look.fraction, look.text()
            self.bar.bar_style = STYLES.get(look.state, "")
        path = self.follow.run.metrics_path
        state = (look.stage, path.stat().st_size if path.exists() else 0, look.state in ENDED)
        if state == self._drawn:
            return
        self._drawn = state
        if look.stage in FIGURES and state[1]:
            data, metadata = plots.bundle(FIGURES[look.stage](self.follow.run))
            self.handle.update(data, metadata=metadata, raw=True)
        else:
            self.handle.update(self._words(look), raw=True)

    def _words(self, look: Snapshot) -> dict:
        """Where there is no picture yet: the text, which a widget beside it says already while the job runs."""
        return {"text/plain": look.text() if self.bar is None or look.state in ENDED else ""}


def watch(place, every: float = 3.0) -> Watch:
    """Show bar and curves of a stage folder (or of the stage at work in a run folder) while other cells run.

    `live = monitor.watch(RUN)` in one cell, the training in the next; it waits for the start and ends with the stage.
    `every`: seconds between two looks.
    """
    return Watch(place, every)


def watch_text(path: str | Path, stream=None, every: float = 1.0) -> int:
    """`dschat watch RUN`: one refreshed line until the stage or the run ends. 0 finished, 1 failed, 130 on Ctrl-C.

    Raises RunError when `path` is no folder.
    """
    if not Path(path).is_dir():
        raise RunError(f"watch: got {str(path)!r}, which is no folder\n  expected: a run folder such as runs/tiny, "
                       "or a stage folder in it")
    follow, line = Follow(path), Line(stream or sys.stdout)
    try:
        while True:
            look = follow.poll()
            text = f"{bar(look.fraction)} {look.text()}"
            if follow.over:
                line.end(text)
                return 0 if look.state == "finished" else 1
            line.show(text, _heading(look))
            time.sleep(every)
    except KeyboardInterrupt:
        line.end("no longer watching; the training goes on")
        return 130


def _heading(look: Snapshot) -> str:
    return f"{bar(look.fraction)} {look.stage}"
