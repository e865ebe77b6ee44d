"""A live view of a training beside its `%%bash` cell; it reads the run folder only.

Bar and figure go through display handles, so their last state stays in the saved notebook, as a widget's would not.
"""
import html
import threading
import time

from IPython.display import DisplayHandle

from dschat_kit.notebook import plots
from dschat_kit.notebook.progress import ENDED, Follow, Snapshot, bar
from dschat_kit.notebook.tables import bundle

FIGURES = {"sft": plots.sft_loss, "reward": plots.reward_training, "dpo": plots.reward_training,
           "ppo": plots.ppo_curves}


class Watch:
    """Bar and curves of a stage folder (or of the stage at work in a run folder) while other cells run.

    `live = monitor.watch(RUN)` in one cell, the training in the next; it waits for the start and ends with the stage.
    `every`: seconds between two looks. `stop()` draws the last state and raises what went wrong in its thread.
    """

    def __init__(self, place, every: float = 3.0):
        self.follow, self.every = Follow(place), every
        self.error: Exception | None = None
        self._drawn, self._stop = None, threading.Event()
        self.bar, self.handle = DisplayHandle(), DisplayHandle()  # in the running cell; the thread updates them
        self.bar.display(_progress(self.follow.poll()), raw=True)
        self.handle.display({"text/plain": ""}, raw=True)
        self.thread = threading.Thread(target=self._work, name="dschat live view", daemon=True)
        self.thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End the live view now; what it shows stays. Raises the error that ended its thread, if one did."""
        self._stop.set()
        self.thread.join(timeout)
        if self.error is not None:
            raise self.error

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
            self.bar.update({"text/plain": f"the live view ended: {type(error).__name__}: {error}"}, raw=True)

    def _update(self) -> None:
        look = self.follow.poll()
        self.bar.update(_progress(look), raw=True)
        run = self.follow.run
        size = run.metrics_path.stat().st_size if run.metrics_path.exists() else 0
        if look.stage in FIGURES and size and self._drawn != (look.stage, size, look.state in ENDED):
            self._drawn = (look.stage, size, look.state in ENDED)
            data, metadata = bundle(FIGURES[look.stage](run))
            self.handle.update(data, metadata=metadata, raw=True)


def _progress(look: Snapshot) -> dict:
    """A bar and the words beside it."""
    shown = f'<progress value="{look.fraction}" style="width:300px"></progress> {html.escape(look.text())}'
    return {"text/html": shown, "text/plain": f"{bar(look.fraction)} {look.text()}"}


watch = Watch  # a notebook says monitor.watch(RUN)
