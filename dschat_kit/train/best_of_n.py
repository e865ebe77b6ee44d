"""Many answers a prompt by the SFT model and what reward models make of them: all that best-of-n needs, for every n.

    deepspeed --num_gpus 1 --module dschat_kit.train.best_of_n --run RUN/ppo

Nothing is trained. RUN/ppo/cases.json says how many held-out prompts and answers there are and names the reward models'
folders; each line of samples.jsonl is one prompt. `dschat overopt` and notebook 07 launch it and read the lines.
"""

import torch
from torch import Tensor, nn

from dschat_kit.data.datasets import TokenRows
from dschat_kit.data.sources import gold_of
from dschat_kit.engine.engines import freeze
from dschat_kit.models.scalar_model import load_scalar_model, response_scores
from dschat_kit.runs import RunError, read_json
from dschat_kit.train.prompts import PromptFeed, sampling_of
from dschat_kit.train.rank import main
from dschat_kit.train.roles import load_policy, rollout_engine
from dschat_kit.train.session import Session

PROMPTS = 4
"""Prompts of one step."""


@torch.no_grad()
def sample(session: Session) -> dict:
    """Returns the plan that was followed. Raises RunError for more than one rank and where the true reward is not
    known."""
    if session.world_size > 1:
        raise RunError(f"got {session.world_size} ranks\n  expected: 1\n  change: --num_gpus 1")
    plan, pipeline = read_json(session.run.path / "cases.json"), session.pipeline
    data, tokenizer, pad_id = session.prepare_data()
    hybrid = rollout_engine(session, freeze(load_policy(session, tokenizer), pipeline, session.device))
    models = {name: load_scalar_model(folder, pipeline.model, pipeline.seed, new_head=False).eval()
              for name, folder in plan["models"].items()}
    feed = PromptFeed(TokenRows(data, "eval"), PROMPTS * plan["answers"], pipeline.seed, pad_id, session, unique=True,
                      samples=plan["answers"])
    sampling, steps = sampling_of(pipeline, tokenizer, pad_id), -(-plan["prompts"] // PROMPTS)
    session.begin(steps, {})
    for step in range(steps):
        prompts = feed.at(step)
        batch = hybrid.generate(prompts.request, sampling)
        scores = {name: scores_of(model, batch.input_ids, batch.attention_mask, pipeline.rollout.micro_batch_size)
                  for name, model in models.items()}
        texts = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in
                 zip(batch.input_ids[:, -batch.response_mask.shape[1]:], batch.response_mask, strict=True)]
        for place in range(PROMPTS):
            mine = range(place, len(texts), PROMPTS)
            gold, prompt = gold_of(prompts.sources[place]), prompts.batch.prompts[place]
            if gold is None:
                raise RunError(f"{prompts.sources[place]}: its true reward is not known\n  expected: the toy world\n"
                               "  change: data.sources=toy")
            session.samples([{
                "step": step + 1, "sample_id": prompts.batch.sample_ids[place], "answer": [texts[i] for i in mine],
                "finished": [bool(batch.finished[i]) for i in mine],
                "gold": [gold.gold_reward(prompt, texts[i], bool(batch.finished[i])) for i in mine],
                "scores": {name: values[place::PROMPTS].tolist() for name, values in scores.items()}}])
        session.log(step + 1, {"answers": len(texts)}, show=("answers",) if (step + 1) % 8 == 0 else ())
    return plan


def scores_of(model: nn.Module, sequences: Tensor, attention_mask: Tensor, rows: int) -> Tensor:
    """(B,) scores, `rows` at a time; equal sequences, of which there are many, are scored once."""
    unique, which = torch.unique(sequences, dim=0, return_inverse=True)
    mask = torch.zeros_like(unique, dtype=torch.bool).index_copy_(0, which, attention_mask.bool())
    return torch.cat([response_scores(model, *part) for part in zip(unique.split(rows), mask.split(rows),
                                                                    strict=True)])[which]


if __name__ == "__main__":
    main(sample)
