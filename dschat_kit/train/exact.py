"""PPO in worlds whose every answer can be listed: the program that `dschat verify` launches.

    deepspeed --num_gpus 2 --module dschat_kit.train.exact --run RUN/ppo

RUN/ppo/cases.json lists the worlds, RUN/ppo/result.json gets what was reached. The actor is a one-layer, 32-wide Llama
fitted to the world's reference; nothing of the training is special but the models and the prompts. Other methods run
in the same worlds: PPO's other advantages, DPO on pairs of reference answers, and GRPO as published.
"""

import copy
import dataclasses
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dschat_kit.config import Model, Pipeline, Ppo, Rollout, Sampling, Zero
from dschat_kit.data.datasets import SequenceBatch, rank_share
from dschat_kit.engine.engines import freeze, set_learning_rate
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.rollout_types import KitRequest, KitSampling
from dschat_kit.engine.zero import full_state_dict
from dschat_kit.models.loading import model_inputs
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.rlhf.rewards import ADVANTAGES, kl_estimates
from dschat_kit.rlhf.rollout import Roles, make_experience, score_responses
from dschat_kit.rlhf.worlds import World, WorldReward, best_of_n, kl_gradients, reached
from dschat_kit.runs import read_json
from dschat_kit.train.dpo import objective as dpo_objective
from dschat_kit.train.exact_models import ROWS, answer_logprobs, export, fit_reference, kl_figures, scalar_copy
from dschat_kit.train.ppo import actor_objective, iterate, learning_rates, trained
from dschat_kit.train.ppo_metrics import Clock
from dschat_kit.train.rank import main
from dschat_kit.train.session import Session


@dataclass(frozen=True)
class Case:
    """One world, its KL coefficient, and how long a method may try: a value of ppo.advantage, dpo, best of N, or
    grpo k3, GRPO as published, whose KL is not in the reward but a loss."""
    world: World
    beta: float
    steps: int
    method: str = "gae"

    def pipeline(self, zero: int, ranks: int) -> Pipeline:
        """256 answers an iteration, 4 epochs of one minibatch, learning rates that fall to 0."""
        name = self.method.split()[0]
        advantage, samples = name if name in ADVANTAGES else "gae", 16 if name in ("rloo", "grpo") else 1
        ppo = Ppo(max_steps=self.steps, rollout_batch_size=256, mini_batch_size=256, micro_batch_size=256 // ranks,
                  ppo_epochs=4, lr_actor=2e-3, lr_critic=4e-3, score_clip=0.0, advantage=advantage,
                  kl_coef=0.0 if self.method == "grpo k3" else self.beta, samples_per_prompt=samples)
        return Pipeline(model=Model(dtype="fp32"), zero=Zero(stage=zero), ppo=ppo, seed=self.world.seed,
                        sampling=Sampling(max_new_tokens=self.world.length),
                        rollout=Rollout(micro_batch_size=256, reuse_logprobs="never"))


def verify(session: Session) -> dict:
    """Every case of cases.json; the model of the last one is exported."""
    plan, found, policy = read_json(session.run.path / "cases.json"), [], None
    session.begin(len(plan["cases"]), {})
    for step, asked in enumerate(plan["cases"], 1):
        case = Case(**{**asked, "world": World(**asked["world"])})
        mine = copy.copy(session)
        mine.pipeline = case.pipeline(plan["zero"], session.world_size)
        row, policy = solve(mine, case)
        row["highest_reward"] = case.world.highest_reward(row["reached_kl"])
        found.append({**asked["world"], "beta": case.beta, "method": case.method, "ranks": session.world_size,
                      "zero": plan["zero"], **row, "frontier": case.world.frontier()})
        session.log(step, row, show=("gap_closed", "beta_hat", "seconds"))
    if session.is_main and policy is not None:
        export(policy, case.world, session.run.model_dir)
    return {"cases": found, "kl_gradients": kl_gradients()}


def solve(session: Session, case: Case) -> tuple[dict, nn.Module | None]:
    """(figures, learned policy) of a method in one world; best of N learns none."""
    started, world, figures = time.time(), case.world, {}
    if case.method.startswith("best of "):
        return {**reached(world, best_of_n(world, int(case.method.split()[-1])), case.beta), "steps": 0,
                "seconds": time.time() - started}, None
    fitted = fit_reference(world)
    reference = copy.deepcopy(fitted)
    if case.method == "gae":
        figures["gradient_error"] = gradient_error(world, case.beta, fitted)
    actor = trained(session, copy.deepcopy(fitted), session.pipeline.ppo.lr_actor)
    roles = Roles(actor=actor, ref=freeze(copy.deepcopy(fitted), session.pipeline, session.device),
                  critic=trained(session, scalar_copy(fitted), session.pipeline.ppo.lr_critic)
                  if session.pipeline.ppo.advantage == "gae" and case.method != "dpo" else None,
                  reward=WorldReward(world).to(session.device))
    figures |= run_dpo(session, case, roles) if case.method == "dpo" else run_ppo(session, case, roles)
    state = full_state_dict(roles.actor.module, session.is_main)
    if session.is_main:
        fitted.load_state_dict(state)
    return {**reached(world, answer_logprobs(fitted, world), case.beta), **kl_figures(fitted, reference, world),
            **figures, "steps": case.steps, "seconds": time.time() - started}, fitted


def run_ppo(session: Session, case: Case, roles: Roles) -> dict:
    """PPO's iterations; how far the first ratios were from 1."""
    world, settings, ratio = case.world, session.pipeline.ppo, {"ratio_error": 0.0, "sampler_ratio_error": 0.0}
    hybrid = HybridEngine(roles.actor, micro_batch_size=session.pipeline.rollout.micro_batch_size)
    sampling = KitSampling(max_new_tokens=world.length, temperature=1.0, pad_token_id=0,
                           stop_token_ids=(world.vocab - 1,) if world.eos else ())
    objective = k3_objective(case.beta) if case.method == "grpo k3" else None
    for step in range(settings.max_steps):
        batch, scored, _, updates = iterate(session, roles, hybrid, prompts_of(session, world, step), sampling, step,
                                            settings, Clock(), objective=objective)
        away = float(((scored.logprobs - batch.logprobs) * batch.response_mask).abs().max().exp()) - 1
        first = max(abs(updates[0]["ratio_max"] - 1), abs(updates[0]["approx_kl"]))
        ratio = {"ratio_error": max(ratio["ratio_error"], first),
                 "sampler_ratio_error": max(ratio["sampler_ratio_error"], session.largest(away)[0])}
    return ratio


def k3_objective(beta: float):
    """The policy loss with beta times the k3 estimate of the KL beside it, as GRPO has it (2402.03300, eq. 3-4)."""
    def objective(actor: nn.Module, micro, settings: Ppo, temperature: float, tokens: float) -> tuple[Tensor, dict]:
        loss, metrics = actor_objective(actor, micro, settings, temperature, tokens)
        new, _ = response_logprobs(actor, micro.sequences, micro.attention_mask, micro.response_mask.shape[1],
                                   temperature)
        return loss + beta * kl_estimates(new, micro.ref_logprobs, micro.response_mask)["k3"].sum() / tokens, metrics
    return objective


def run_dpo(session: Session, case: Case, roles: Roles) -> dict:
    """As many optimiser steps as PPO makes, each on 128 pairs of reference answers, whose order is drawn from the
    rewards by Bradley-Terry: log-odds r_1 - r_2."""
    world, settings = case.world, session.pipeline.ppo
    sequences, attention_mask, mask = world.sequences()
    mask = torch.cat([torch.zeros(len(mask), sequences.shape[1] - mask.shape[1], dtype=torch.bool), mask], dim=1)
    for step in range(settings.max_steps * settings.ppo_epochs):
        draw = torch.Generator().manual_seed(session.pipeline.seed * 1_000_003 + step)
        first = (world.reference.exp() / world.prompts).flatten().multinomial(128, True, generator=draw)
        prompts = first // len(world.answers[0])
        second = prompts * len(world.answers[0]) + world.reference[prompts].exp().multinomial(1, generator=draw)[:, 0]
        odds = world.rewards.flatten()[first] - world.rewards.flatten()[second]
        right = torch.rand(128, generator=draw, dtype=torch.float64) < odds.sigmoid()
        rows = torch.cat([torch.where(right, first, second), torch.where(right, second, first)]).view(2, -1)
        rows = rows[:, session.rank::session.world_size].flatten()
        batch = SequenceBatch(sequences=sequences[rows], attention_mask=attention_mask[rows], response_mask=mask[rows])
        set_learning_rate(roles.actor, learning_rates(settings, step // settings.ppo_epochs)["lr_actor"])
        session.backward(roles.actor, dpo_objective(roles, batch.to(session.device), case.beta, pairs=128)[0])
    return {}


def prompts_of(session: Session, world: World, step: int) -> KitRequest:
    """The world's prompts in turn, this rank's share of them."""
    rows, samples = session.pipeline.ppo.rollout_batch_size, session.pipeline.ppo.samples_per_prompt
    places = rank_share(torch.arange(rows), session.rank, session.world_size)
    prompt_ids, mask = world.prompt_batch(places % (rows // samples) % world.prompts)
    seeds = (session.pipeline.seed * 1_000_003 + step) * rows + places
    return KitRequest(prompt_ids=prompt_ids.to(session.device), prompt_attention_mask=mask.to(session.device),
                      row_seeds=seeds)


def gradient_error(world: World, beta: float, fitted: nn.Module, temperature: float = 1.0) -> float:
    """Relative distance between PPO's first gradient, taken over all answers instead of samples, and that of
    E[r] - beta KL, at a policy away from the optimum and with a critic that is wrong.

    lambda is 1: then the values of the critic have no part in the expected gradient.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed + 1)
        actor, critic = copy.deepcopy(fitted), scalar_copy(fitted)
        for parameter in [*actor.parameters(), critic.classifier.score.weight]:
            parameter.data += 0.05 * torch.randn_like(parameter)
    roles = Roles(actor=actor, critic=critic, ref=fitted, reward=WorldReward(world))
    settings = Ppo(kl_coef=beta, gae_lambda=1.0, score_clip=0.0)
    sequences, attention_mask, mask = world.sequences()
    scored = score_responses(roles, sequences, attention_mask, world.length, temperature, ROWS)
    experience = make_experience(sequences, attention_mask, mask, mask.any(1), scored, settings,
                                 lambda moments: moments.new_tensor([1, 0, 1]))  # whitening leaves all as it is
    weights = (scored.logprobs * mask).sum(1).exp()
    experience = dataclasses.replace(experience, advantages=experience.advantages * weights[:, None])
    for rows in experience.split(ROWS):
        actor_objective(actor, rows, settings, temperature, world.prompts)[0].backward()
    found = torch.cat([-p.grad.flatten() for p in actor.parameters()])
    actor.zero_grad()
    true = _true_gradient(world, beta, actor, fitted, temperature)
    return float((found - true).norm() / true.norm())


def _true_gradient(world: World, beta: float, actor: nn.Module, ref: nn.Module, temperature: float) -> Tensor:
    """Of E[r] - beta KL, by differentiating the sum over all answers; nothing of PPO is used."""
    sequences, attention_mask, mask = world.sequences()
    for rows in torch.arange(len(sequences)).split(ROWS):
        tokens, rewards = sequences[rows], world.rewards.flatten()[rows]
        responses = tokens[:, -world.length:, None]
        inputs = model_inputs(actor, tokens, attention_mask[rows])
        own, other = (((model(**inputs).logits[:, -world.length - 1:-1] / temperature).log_softmax(-1)
                       .gather(-1, responses).squeeze(-1) * mask[rows]).sum(-1) for model in (actor, ref))
        (own.exp() * (rewards - beta * (own - other.detach()))).sum().div(world.prompts).backward()
    return torch.cat([p.grad.flatten() for p in actor.parameters()])


if __name__ == "__main__":
    main(verify)
