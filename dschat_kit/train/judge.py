"""Models that are trained already answer the held-out prompts, as PPO's actor does before and after: one rank that
`dschat study` launches for the moving average of the weights, and for best-of-n, which trains nothing.

    python -m dschat_kit.train.judge --run RUN/ppo

RUN/ppo/cases.json lists {model, seed, best_of: [n, ...]}; RUN/ppo/result.json gets the means of each n. For n above 1
every prompt has as many answers as the largest n.
"""

from pathlib import Path

from dschat_kit.data.datasets import TokenRows
from dschat_kit.engine.engines import freeze
from dschat_kit.rlhf.rollout import Roles
from dschat_kit.runs import read_json
from dschat_kit.train import sft
from dschat_kit.train.prompts import PromptFeed, answer, averages, sampling_of, text_rows
from dschat_kit.train.rank import main
from dschat_kit.train.roles import load_policy, load_reward, rollout_engine, scorer
from dschat_kit.train.session import Session


def judge(session: Session) -> dict:
    """The means of every case, one for each n of its `best_of`."""
    pipeline, cases, found = session.pipeline, read_json(session.run.path / "cases.json"), []
    data, tokenizer, pad_id = session.prepare_data()
    rows, texts = TokenRows(data, "eval"), text_rows(data, held_out=True)
    sampling = sampling_of(pipeline, tokenizer, pad_id)

    ref, reward = scorer(session, load_policy(session, tokenizer)), scorer(session, load_reward(session))
    session.begin(len(cases), {})
    for step, case in enumerate(cases, 1):
        actor = freeze(load_policy(session, tokenizer, Path(case["model"])), pipeline, session.device)
        hybrid = rollout_engine(session, actor)
        held_out = PromptFeed(rows, pipeline.ppo.eval_prompts, case["seed"], pad_id, session, unique=True)
        if (most := max(case["best_of"])) > 1:
            held_out.count = most * len(held_out.keep)
        lines = answer(session, hybrid, Roles(actor=actor, critic=None, ref=ref, reward=reward), held_out, sampling,
                       tokenizer, "after")
        means = {str(n): averages(session, best_answers(lines, n)) for n in case["best_of"]}
        found.append({**case, "means": means, "lm_loss": sft.evaluate(session, actor, texts, pad_id)})
        session.log(step, {f"{name}_best_of_{n}": mean[name] for n, mean in means.items()
                           for name in ("score", "gold", "kl") if name in mean})
    return {"cases": found}


def best_answers(lines: list[dict], n: int) -> list[dict]:
    """Of each n answers to one prompt the one with the highest score; answers that make no full n are left out."""
    by_prompt: dict[str, list[dict]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line)
    groups = [some[start:start + n] for some in by_prompt.values() for start in range(0, len(some) - n + 1, n)]
    return [max(group, key=lambda line: line["score"]) for group in groups]


if __name__ == "__main__":
    main(judge)
