"""A stage in which rank 1 meets a fault: `deepspeed --num_gpus 2 --module faulty --run RUN/ppo`, FAULT="WHERE:WHAT".

It comes at the first call of WHERE after one step has been done, so that every launch gets one step further.
"""

import importlib
import os
import signal
import sys
import time

import deepspeed

from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.train import rank
from dschat_kit.train.session import Session

STAGE = importlib.import_module("dschat_kit.train." + os.path.basename(sys.argv[sys.argv.index("--run") + 1]))
WHERE = {"generation": (HybridEngine, "generate"), "scoring": (STAGE, "score_responses"),
         "backward": (Session, "backward"), "saving": (deepspeed.DeepSpeedEngine, "save_checkpoint")}
done = []


def hang():
    time.sleep(3600)


WHAT = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "hang": hang, "nothing": lambda: None}


def inject(where: str, what: str) -> None:
    place, name = WHERE[where]
    checkpoint, original = Session.checkpoint, getattr(place, name)

    def counted(session, *args):
        checkpoint(session, *args)
        done.append(1)

    def faulty(*args, **named):
        if done and os.environ["RANK"] == "1":
            setattr(place, name, original)
            if what == "nan":
                args = (*args[:-1], args[-1] * float("nan"))
            else:
                WHAT[what]()
        return original(*args, **named)

    Session.checkpoint = counted
    setattr(place, name, faulty)


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        inject(*os.environ["FAULT"].split(":"))
    rank.main(STAGE.train)
