"""One record from its source to the lines of a run folder, on the CPU, through the functions that a run uses.

    pytest -s tests/test_life_of_a_sample.py     prints the walk
"""

from types import SimpleNamespace

import pytest
import torch

from dschat_kit.config import Data, Model, Pipeline, Ppo, Sampling
from dschat_kit.data.datasets import TokenRows, pad_prompts, preference_batch, sft_batch
from dschat_kit.data.pipeline import build_stage_data, tokenizer_of
from dschat_kit.data.prompts import PromptStyle, question_of
from dschat_kit.data.sources import read_source
from dschat_kit.data.splits import part_of
from dschat_kit.data.tokenizer import pad_id_of
from dschat_kit.engine.decode import Plain, decode
from dschat_kit.engine.rollout_types import KitRequest
from dschat_kit.metrics import JsonlWriter, read_metrics
from dschat_kit.models.loading import load_causal_lm
from dschat_kit.models.saving import save_folder
from dschat_kit.models.scalar_model import last_token, load_scalar_model, response_values
from dschat_kit.rlhf.logprobs import response_logprobs, sequence_logprobs
from dschat_kit.rlhf.losses import policy_loss, preference_loss, sft_loss, value_loss
from dschat_kit.rlhf.rollout import Roles, make_experience, score_responses
from dschat_kit.runs import open_run, prepare_stage
from dschat_kit.train.ppo_metrics import rollout_metrics
from dschat_kit.train.prompts import Prompts, sample_lines, sampling_of

PIPELINE = Pipeline(data=Data(rows=150, stage_split="1,1,1"), sampling=Sampling(max_new_tokens=12),
                    model=Model(hidden_size=32, heads=2, layers=1, intermediate_size=64, vocab_size=300, dtype="fp32"),
                    ppo=Ppo(missing_eos_score=None))
ALONE = SimpleNamespace(pipeline=PIPELINE, sum_tensor=lambda tensor: tensor, largest=lambda *values: list(values))
"""What a session of one rank does with sums."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A built data stage and four roles of a tiny random Llama: actor and ref still agree, critic and reward too."""
    root = tmp_path_factory.mktemp("life")
    run, _ = prepare_stage(root, "data", PIPELINE)
    build_stage_data(run, report=lambda line: None)
    tokenizer = tokenizer_of(run)
    actor, ref = (load_causal_lm("scratch", PIPELINE.model, tokenizer, 0) for _ in range(2))
    save_folder(actor, tokenizer, root / "model")
    critic, reward = (load_scalar_model(root / "model", PIPELINE.model, 1, new_head=True) for _ in range(2))
    roles = Roles(actor=actor, critic=critic, ref=ref.eval(), reward=reward.eval())
    return SimpleNamespace(run=run, tokenizer=tokenizer, roles=roles, pad_id=pad_id_of(tokenizer))


def test_one_record_is_followed_to_the_end(world, tmp_path):
    said = []

    # source: a row becomes a record, and its id is born
    record = next(r for r in read_source("toy", "toy", PIPELINE.data, PIPELINE.seed)
                  if part_of(r.split_key, PIPELINE.data.split_shares(), PIPELINE.data.eval_fraction) == "ppo")
    said.append(f"source      {record.sample_id}: {question_of(record.prompt)!r}")

    # prompt, split, token rows: the data stage has put it into exactly one part
    tables = {part: TokenRows(world.run.path, part) for part in ("sft", "reward", "ppo", "eval")}
    places = {part: [i for i, name in enumerate(table.table["sample_id"]) if name == record.sample_id]
              for part, table in tables.items()}
    assert [part for part, rows in places.items() if rows] == ["ppo"]
    row, = tables["ppo"].take(places["ppo"][:1])
    text = PromptStyle().prompt(record.turns)
    assert row["prompt"] == text and world.tokenizer.decode(row["prompt_ids"]) == text
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == world.tokenizer.eos_token_id
    said.append(f"prompt      {text!r}")
    said.append("split       ppo, by the hash of its question: not in sft, reward or eval")
    said.append(f"tokens      {len(row['prompt_ids'])} prompt, {len(row['chosen_ids'])} chosen, "
                f"{len(row['rejected_ids'])} rejected, each response with its EOS")

    # batches: what each stage makes of such a row
    sft, pair = sft_batch([row], world.pad_id), preference_batch([row], world.pad_id)
    prompts = pad_prompts([row], world.pad_id)
    assert sft.response_mask.sum() == len(row["chosen_ids"]) and prompts.sample_ids == [record.sample_id]
    logprobs = sequence_logprobs(world.roles.actor, sft.sequences, sft.attention_mask, sft.response_mask)
    answer_loss, _ = sft_loss(logprobs, sft.response_mask.sum())
    chosen, rejected = last_token(world.roles.reward(pair.sequences, pair.attention_mask), pair.attention_mask).chunk(2)
    pair_loss, _ = preference_loss(chosen, rejected, pairs=1)
    assert 4 < answer_loss < 9  # about log(vocabulary): the weights are random
    said.append(f"batches     sft {tuple(sft.sequences.shape)} loss {answer_loss:.2f};  reward "
                f"{tuple(pair.sequences.shape)} loss {pair_loss:.2f};  ppo {tuple(prompts.prompt_ids.shape)}")

    # rollout: the actor answers, all roles look at the answer
    request = KitRequest(prompt_ids=prompts.prompt_ids, prompt_attention_mask=prompts.attention_mask,
                         row_seeds=torch.tensor([7]))
    sampling = sampling_of(PIPELINE, world.tokenizer, world.pad_id)
    batch = decode(Plain(world.roles.actor, 1), request, sampling)
    length = batch.response_mask.shape[1]
    scored = score_responses(world.roles, batch.input_ids, batch.attention_mask, length, sampling.temperature, 8)
    assert torch.allclose(scored.logprobs, batch.logprobs, atol=1e-4)  # what the sampler saw
    line, = sample_lines(Prompts(prompts, [row["source"]], request), batch, scored, world.tokenizer, "rollout", 1)
    said.append(f"response    {line['tokens']} tokens, ended by EOS: {line['finished']}")
    said.append(f"score       {line['score']:+.3f} by the reward model, gold {line['gold']:.1f} (never trained on)")

    # experience and rewards: one reward a token, the score at the last of them
    experience = make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished, scored,
                                 PIPELINE.ppo, ALONE.sum_tensor)
    assert experience.rewards.sum().item() == pytest.approx(line["score"], abs=1e-5)  # the actor is the ref: no KL yet
    assert experience.rewards[0, :-1].abs().max() < 1e-5 and line["kl"] == pytest.approx(0, abs=1e-5)
    said.append(f"experience  rewards {tuple(experience.rewards.shape)}: -kl_coef * KL a token, the score on the last; "
                f"their sum {experience.rewards.sum():+.3f}")

    # losses: at the first update the policy is the one that sampled
    new, _ = response_logprobs(world.roles.actor, experience.sequences, experience.attention_mask, length,
                               sampling.temperature)
    values = response_values(world.roles.critic, experience.sequences, experience.attention_mask, length)
    tokens = experience.response_mask.sum()
    loss, policy = policy_loss(new, experience.logprobs, experience.advantages, experience.response_mask,
                               PIPELINE.ppo.clip_range, tokens)
    critic_loss, value = value_loss(values, experience.values, experience.returns, experience.response_mask,
                                    PIPELINE.ppo.value_clip_range, tokens)
    (loss + critic_loss).backward()
    assert policy["ratio_max"] == pytest.approx(1, abs=1e-5) and policy["clip_fraction"] == 0
    assert all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in role.parameters())
               for role in (world.roles.actor, world.roles.critic))
    said.append(f"losses      policy {loss:+.3f} (ratio {policy['ratio_max']:.5f}), value {critic_loss:.3f}")

    # the run folder: one line of each file, and the id is in it
    update = {name: float(number) for name, number in {**policy, **value}.items()}
    metrics = rollout_metrics(ALONE, experience, scored, batch, [update])
    run = open_run(tmp_path, "ppo")
    run.path.mkdir()
    for path, written in ((run.metrics_path, {"step": 1, **metrics}), (run.samples_path, line)):
        JsonlWriter(path).write(written)
    (first,), (sample,) = read_metrics(run.metrics_path), read_metrics(run.samples_path)
    assert first["score_mean"] == pytest.approx(sample["score"]) and first["response_length"] == sample["tokens"]
    assert sample["sample_id"] == record.sample_id and sample["prompt"] == text
    said.append(f"metrics     {{'step': 1, 'score_mean': {first['score_mean']:.3f}, 'kl': {abs(first['kl']):.3f}, "
                f"'response_length': {first['response_length']:.0f}, ...}}")
    said.append(f"samples     {{'sample_id': {sample['sample_id']!r}, 'score': {sample['score']:.3f}, ...}}")
    print("\n" + "\n".join(said))
