"""`dschat overopt`: when does a better score stop to mean a better answer? Gold and learned reward against the distance
from the SFT policy, for PPO and best-of-n under reward models of several sizes, taught by more or fewer pairs.

The study of Gao et al. 2022 (2210.10760) on the toy world, whose true reward is known. Every training is an ordinary
stage in a run folder of its own, so an interrupted study goes on where it was; `overopt_report.py` reads them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from dschat_kit.machine import dschat
from dschat_kit.runs import RunError, StageRun, link_stages, open_run, read_json, write_json

SIZES = {128: (), 64: ("model.hidden_size=64", "model.intermediate_size=192"),
         32: ("model.hidden_size=32", "model.intermediate_size=96", "model.layers=1")}
"""Reward models by width and how they differ from the policy, which is as the first one."""
PAIRS = (512, 2048, 8192)
"""Preferences that a reward model learns from, each read once."""
SEEDS = (0, 1)
PROMPTS, ANSWERS = 64, 256
"""Of best-of-n."""
REWARD_BATCH = 16
PPO = ("ppo.max_steps=36", "ppo.kl_coef=0", "ppo.eval_prompts=64", "telemetry.samples=0",
       "telemetry.rollout_samples=128")
"""No KL penalty, as in the paper: the policy passes through every distance, and every rollout is a point."""


@dataclass(frozen=True)
class Case:
    """One reward model of one seed; its folder also holds the PPO that trusted it."""
    seed: int
    width: int
    pairs: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.width} wide, {self.pairs} pairs"

    def folder(self, root: Path) -> Path:
        """Where its stages are."""
        return root / f"seed{self.seed}" / f"{self.width}-{self.pairs}"


def cases() -> list[Case]:
    """All reward models."""
    return [Case(*values) for values in product(SEEDS, SIZES, PAIRS)]


def make(root: Path) -> None:
    """Train and sample what is missing, two jobs of one rank side by side. Raises RunError when one fails."""
    policy = next(iter(SIZES))

    def sft(seed: int, width: int = policy) -> Path:
        return root / f"seed{seed}" / f"sft-{width}"

    def data(seed: int) -> None:
        stage("data", sft(seed), f"seed={seed}")

    def base(seed: int, width: int) -> None:
        stage("sft", link_stages(sft(seed, width), sft(seed), "data"), *SIZES[width])

    def reward(case: Case) -> None:
        other = [f"reward.model={sft(case.seed, case.width) / 'sft' / 'model'}"] * (case.width != policy)
        stage("reward", link_stages(case.folder(root), sft(case.seed), "data", "sft"), *other,
              f"reward.batch_size={REWARD_BATCH}", f"reward.max_steps={case.pairs // REWARD_BATCH}")

    def ppo(case: Case) -> None:
        stage("ppo", case.folder(root), *PPO)

    def sampled(seed: int) -> None:
        run = plan_best_of_n(root / f"seed{seed}" / "best-of-n", sft(seed), PROMPTS, ANSWERS,
                             {case.name: case.folder(root) for case in cases() if case.seed == seed})
        if run.state != "finished":
            _run(["launch", "--", "deepspeed", "--num_gpus", "1", "--module", "dschat_kit.train.best_of_n", "--run",
                  str(run.path), "--resume"], run.root)

    with ThreadPoolExecutor(2) as pool:
        for work, items in ((data, [(seed,) for seed in SEEDS]), (base, product(SEEDS, SIZES)),
                            (reward, [(case,) for case in cases()]), (sampled, [(seed,) for seed in SEEDS]),
                            (ppo, [(case,) for case in cases()])):
            list(pool.map(lambda item: work(*item), items))  # noqa: B023  used before the next turn


def stage(name: str, folder: Path, *settings: str) -> None:
    """One stage on one rank, gone on with or left as it is where it was begun or finished before."""
    _run([name, "--run-root", str(folder), "--num-gpus", "1", "--resume", "auto",
          *(["--set", *settings] if settings else [])], folder)


def plan_best_of_n(folder: Path, policy: Path, prompts: int, answers: int, models: dict[str, Path]) -> StageRun:
    """Prepare to sample `answers` to each of the held-out `prompts` with the SFT model of the run folder `policy`, and
    to score them with the reward models of the run folders `models`. Returns the stage that holds them, finished where
    they were sampled before. Raises RunError where others are there."""
    run = open_run(link_stages(folder, policy, "data", "sft"), "ppo")
    plan = {"prompts": prompts, "answers": answers,
            "models": {name: str((other / "reward" / "model").absolute()) for name, other in models.items()},
            "hashes": [open_run(other, "reward").config["config_hash"] for other in models.values()]}
    cases, new = run.path / "cases.json", run.state == "missing"
    if not new and read_json(cases) != plan:
        raise RunError(f"{folder} holds other answers than those asked for\n  change: remove it, or another folder")
    if new:
        run.path.mkdir(exist_ok=True)
        write_json(run.path / "config.json", {**open_run(folder, "sft").config, "stage": "ppo"})
        write_json(cases, plan)
    return run


def _run(words: list[str], folder: Path) -> None:
    if code := dschat(*words):
        raise RunError(f"`dschat {words[0]}` in {folder} ended with {code}\n"
                       "  change: see the logs there; the same command goes on with what is missing")
