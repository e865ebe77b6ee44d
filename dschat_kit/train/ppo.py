"""Stage 3, PPO: the SFT model learns to score high with the reward model without leaving the SFT policy far behind.

    deepspeed --num_gpus 2 --module dschat_kit.train.ppo --run RUN/ppo

Four roles: actor (trained, from SFT), critic (trained, from the reward model), ref (frozen SFT), reward (frozen).
One iteration: 1. the actor answers a batch of prompts  2. all roles look at the answers  3. rewards less the KL
penalty, GAE, whitening over all ranks  4. ppo_epochs passes of clipped updates in minibatches. Schulman et al. 2017
(1707.06347), Ouyang et al. 2022 (2203.02155).
"""

from collections.abc import Iterator

from dschat_kit.data.datasets import TokenRows
from dschat_kit.data.splits import epoch_order
from dschat_kit.engine.engines import build_engine, freeze, grad_norm, learning_rate, set_learning_rate
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.models.loading import check_length, load_causal_lm
from dschat_kit.models.lora import add_adapters
from dschat_kit.models.scalar_model import load_scalar_model, response_values
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.rlhf.losses import policy_loss, value_loss
from dschat_kit.rlhf.rollout import Roles, make_experience, score_responses
from dschat_kit.runs import open_run
from dschat_kit.train.ppo_metrics import Clock, add_metrics, rollout_metrics, summary
from dschat_kit.train.prompts import PromptFeed, evaluate, reused, sample_lines, sampling_of
from dschat_kit.train.rank import main
from dschat_kit.train.session import Session


def train(session: Session) -> dict:
    """Returns the numbers of result.json."""
    pipeline, settings = session.pipeline, session.pipeline.ppo
    data, tokenizer, pad_id = session.prepare_data()
    sampling = sampling_of(pipeline, tokenizer, pad_id)
    roles = build_roles(session, tokenizer)
    hybrid = HybridEngine(roles.actor, micro_batch_size=pipeline.rollout.micro_batch_size,
                          release_inference_cache=pipeline.rollout.release_inference_cache,
                          max_out_tokens=pipeline.rollout.max_out_tokens)
    feed = PromptFeed(TokenRows(data, "ppo"), settings.rollout_batch_size, pipeline.seed, pad_id, session)
    held_out = PromptFeed(TokenRows(data, "eval"), settings.eval_prompts, pipeline.seed, pad_id, session, unique=True)
    state = session.begin(settings.max_steps, {"actor": roles.actor, "critic": roles.critic})
    if state is None:
        state = {"before": evaluate(session, hybrid, roles, held_out, sampling, tokenizer, "before"), "tokens": 0,
                 "seconds": dict.fromkeys(("generation", "scoring", "training", "other"), 0.0)}

    for step in range(session.first_step, settings.max_steps):
        clock, lrs = Clock(), learning_rates(session, step)

        # 1. The actor answers a batch of prompts.
        prompts = feed.at(step)
        batch = hybrid.generate(prompts.request, sampling)
        clock.lap("generation")

        # 2. All four roles look at the answers.
        scored = score_responses(roles, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1],
                                 sampling.temperature, pipeline.rollout.micro_batch_size, reused(pipeline, batch))

        # 3. Scores less the KL penalty become rewards; rewards and values become advantages and returns.
        experience = make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished, scored,
                                     settings, session.sum_tensor)
        clock.lap("scoring")

        # 4. Clipped updates in minibatches, reshuffled in each epoch.
        updates = [update(session, roles, minibatch, sampling.temperature, lrs) for epoch in range(settings.ppo_epochs)
                   for minibatch in minibatches(session, experience, step, epoch)]
        clock.lap("training")

        row = rollout_metrics(session, experience, scored, batch, updates)
        session.samples(sample_lines(prompts, batch, scored, tokenizer, "rollout", step + 1,
                                     limit=pipeline.telemetry.rollout_samples))
        clock.lap("other")
        row |= {"kl_coef": settings.kl_coef, "lr_actor": lrs["actor"], "lr_critic": lrs["critic"]}
        row |= clock.row(session, row["tokens"])
        session.log(step + 1, row, show=("score_mean", "kl", "response_length", "clip_fraction"))
        state["tokens"] += row["tokens"]
        state["seconds"] = {name: value + row[f"seconds_{name}"] for name, value in state["seconds"].items()}
        session.checkpoint(step + 1, state)

    after = evaluate(session, hybrid, roles, held_out, sampling, tokenizer, "after")
    session.export(roles.actor.module, tokenizer)
    rollout = {"path": hybrid.path, "reason": hybrid.reason}
    return summary(state["before"], after, state, settings.max_steps) | {"rollout": rollout}


def build_roles(session: Session, tokenizer) -> Roles:
    """actor and critic as DeepSpeed engines with their optimisers; ref and reward frozen."""
    pipeline, settings = session.pipeline, session.pipeline.ppo
    sft, reward = open_run(session.root, "sft").model_dir, open_run(session.root, "reward").model_dir

    def trained(model, lr: float):
        return build_engine(add_adapters(model, pipeline.lora, pipeline.seed), pipeline, lr=lr, eps=1e-5,
                            batch_size=settings.mini_batch_size, micro_batch_size=settings.micro_batch_size,
                            world_size=session.world_size, grad_clip=settings.grad_clip)

    actor, ref = (load_causal_lm(sft, pipeline.model, tokenizer, pipeline.seed) for _ in range(2))
    critic, scorer = (load_scalar_model(reward, pipeline.model, pipeline.seed, new_head=False) for _ in range(2))
    check_length(actor.config, pipeline.data.max_prompt_tokens + pipeline.sampling.max_new_tokens)
    return Roles(actor=trained(actor, settings.lr_actor), critic=trained(critic, settings.lr_critic),
                 ref=freeze(ref, pipeline, session.device), reward=freeze(scorer, pipeline, session.device))


def learning_rates(session: Session, step: int) -> dict[str, float]:
    """{"actor", "critic"}: both rise over the warm-up and fall linearly."""
    settings = session.pipeline.ppo
    return {role: learning_rate(base, step, settings.max_steps, settings.warmup, settings.min_lr, "linear")
            for role, base in (("actor", settings.lr_actor), ("critic", settings.lr_critic))}


def minibatches(session: Session, experience: Experience, step: int, epoch: int) -> Iterator[Experience]:
    """This rank's part of each minibatch, in an order that is new each epoch and a function of (seed, step, epoch)."""
    order = epoch_order(len(experience), session.pipeline.seed + 1_000_003 * (step + 1), epoch)
    return experience.select(order).split(session.pipeline.ppo.mini_batch_size // session.world_size)


def update(session: Session, roles: Roles, minibatch: Experience, temperature: float, lrs: dict[str, float]) -> dict:
    """One optimiser step of actor and critic on one minibatch; returns its metrics over all ranks."""
    settings, A = session.pipeline.ppo, minibatch.response_mask.shape[1]
    tokens, = session.sum(minibatch.response_mask.sum())
    set_learning_rate(roles.actor, lrs["actor"])
    set_learning_rate(roles.critic, lrs["critic"])
    totals = {}
    for micro in minibatch.by_length().split(settings.micro_batch_size):
        new_logprobs, _ = response_logprobs(roles.actor, micro.sequences, micro.attention_mask, A, temperature)
        actor_loss, policy = policy_loss(new_logprobs, micro.logprobs, micro.advantages, micro.response_mask,
                                         settings.clip_range, tokens)
        session.backward(roles.actor, actor_loss)
        new_values = response_values(roles.critic, micro.sequences, micro.attention_mask, A)
        critic_loss, value = value_loss(new_values, micro.values, micro.returns, micro.response_mask,
                                        settings.value_clip_range, tokens)
        session.backward(roles.critic, critic_loss)
        totals = add_metrics(totals, {**policy, **value})
    ratio_max, = session.largest(totals.pop("ratio_max"))
    row = dict(zip(totals, session.sum(*totals.values()), strict=True))
    return row | {"ratio_max": ratio_max, "grad_norm_actor": grad_norm(roles.actor),
                  "grad_norm_critic": grad_norm(roles.critic)}


if __name__ == "__main__":
    main(train)
