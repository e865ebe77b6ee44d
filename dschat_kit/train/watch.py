"""What reaches a rank from outside its own course: being asked to end, and a silence that lasts too long."""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable


class Interrupted(BaseException):
    """SIGTERM or SIGINT; a BaseException so that nothing on the way swallows it."""


class Stopped(Interrupted):
    """The same, after every rank has saved a checkpoint."""


class Hanging(RuntimeError):
    """A rank made no progress for too long."""


class Watch:
    """One rank's signals and its watchdog.

    `asked` is the signal that asked for an end, "" for none. While `can_save` is set such a signal waits for the next
    step boundary, where all ranks save and stop together; otherwise, and at a second Ctrl-C, it ends the rank at once.
    """

    def __init__(self, hung: Callable[[Hanging], int]):
        self.asked, self.can_save, self._hung = "", False, hung
        self._asked_at, self._beat, self._over = 0.0, time.monotonic(), threading.Event()

    def take_signals(self) -> None:
        """Handle SIGTERM and SIGINT. SIGTERM also writes the stack of every thread to the rank's log, from C: where
        a rank hangs, no Python runs, and it is with SIGTERM that DeepSpeed ends what one dead rank leaves behind."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signal)
        faulthandler.register(signal.SIGTERM, chain=True)

    def _signal(self, number: int, _frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        again = number == signal.SIGINT and self.asked and now - self._asked_at > 1  # launchers repeat
        if again or not self.can_save:
            raise Interrupted(f"{name}: asked to end, or another rank has died")
        if not self.asked:
            self.asked, self._asked_at = name, now

    def beat(self) -> None:
        """There is progress."""
        self._beat = time.monotonic()

    def rest(self) -> None:
        """What comes has no bound of its own: until the next beat, silence is no hanging."""
        self._beat = math.inf

    def start(self, minutes: float) -> None:
        """From now on, after `minutes` without a beat: every thread's stack to the rank's log, `hung(error)` to say so,
        and the process ends with the code that it returns."""
        self.beat()
        threading.Thread(target=self._look, args=(60 * minutes,), daemon=True).start()

    def stop(self) -> None:
        """The rank has done its work."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _look(self, limit: float) -> None:
        while not self._over.wait(limit / 20):
            if time.monotonic() - self._beat < limit:
                faulthandler.dump_traceback_later(1.5 * limit, exit=True)  # where C code keeps even this thread waiting
                continue
            faulthandler.dump_traceback(all_threads=True)
            code = self._hung(Hanging(f"no progress for {limit:g} s: this rank or another hangs, or the link to "
                                      "another machine is lost"))
            sys.stderr.flush()
            os._exit(code)
