"""PPO in worlds whose every answer can be listed: the program that `dschat verify` launches.

    deepspeed --num_gpus 2 --module dschat_kit.train.exact --run RUN/ppo

RUN/ppo/cases.json lists the worlds, RUN/ppo/result.json gets what was reached. The actor is a one-layer, 32-wide Llama
fitted to the world's reference; nothing of the training is special but the models and the prompts.
"""

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dschat_kit.config import Model, Pipeline, Ppo, Rollout, Sampling, Zero
from dschat_kit.data.datasets import rank_share
from dschat_kit.engine.engines import freeze
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.rollout_types import KitRequest, KitSampling
from dschat_kit.engine.zero import full_state_dict
from dschat_kit.models.loading import model_inputs
from dschat_kit.models.scalar_model import ScalarModel
from dschat_kit.rlhf.rollout import Roles, make_experience, score_responses
from dschat_kit.rlhf.worlds import World, WorldReward, reached
from dschat_kit.runs import RunError, read_json, write_json
from dschat_kit.train.ppo import actor_objective, iterate, trained
from dschat_kit.train.ppo_metrics import Clock
from dschat_kit.train.rank import main
from dschat_kit.train.session import Session

__all__ = ["Case", "answer_logprobs", "fit_reference", "gradient_error", "solve", "verify"]

ROWS = 8192
"""Enumerated answers of one forward pass."""


@dataclass(frozen=True)
class Case:
    """One world, its KL coefficient, and how long PPO may try."""
    world: World
    beta: float
    steps: int

    def pipeline(self, zero: int, ranks: int) -> Pipeline:
        """256 answers an iteration, 4 epochs of one minibatch, learning rates that fall to 0."""
        ppo = Ppo(max_steps=self.steps, rollout_batch_size=256, mini_batch_size=256, micro_batch_size=256 // ranks,
                  ppo_epochs=4, lr_actor=2e-3, lr_critic=4e-3, kl_coef=self.beta, score_clip=0.0)
        return Pipeline(model=Model(dtype="fp32"), zero=Zero(stage=zero), ppo=ppo, seed=self.world.seed,
                        sampling=Sampling(max_new_tokens=self.world.length),
                        rollout=Rollout(micro_batch_size=256, reuse_logprobs="never"))


def verify(session: Session) -> dict:
    """Every case of cases.json; the model of the last one is exported."""
    plan, found = read_json(session.run.path / "cases.json"), []
    session.begin(len(plan["cases"]), {})
    for step, asked in enumerate(plan["cases"], 1):
        case = Case(World(**asked["world"]), asked["beta"], asked["steps"])
        mine = copy.copy(session)
        mine.pipeline = case.pipeline(plan["zero"], session.world_size)
        row, policy = solve(mine, case)
        found.append({**asked["world"], "beta": case.beta, "ranks": session.world_size, "zero": plan["zero"], **row,
                      "frontier": case.world.frontier()})
        session.log(step, row, show=("gap_closed", "beta_hat", "gradient_error", "seconds"))
    if session.is_main:
        export(policy, case.world, session.run.model_dir)
    return {"cases": found}


def solve(session: Session, case: Case) -> tuple[dict, nn.Module]:
    """(figures, learned policy) of PPO in one world."""
    started, world, settings = time.time(), case.world, session.pipeline.ppo
    fitted = fit_reference(world)
    error = gradient_error(world, case.beta, fitted)
    roles = Roles(actor=trained(session, copy.deepcopy(fitted), settings.lr_actor),
                  critic=trained(session, scalar_copy(fitted), settings.lr_critic),
                  ref=freeze(copy.deepcopy(fitted), session.pipeline, session.device),
                  reward=WorldReward(world).to(session.device))
    hybrid = HybridEngine(roles.actor, micro_batch_size=session.pipeline.rollout.micro_batch_size)
    sampling = KitSampling(max_new_tokens=world.length, temperature=1.0, pad_token_id=0,
                           stop_token_ids=(world.vocab - 1,) if world.eos else ())
    ratio = {"ratio_error": 0.0, "sampler_ratio_error": 0.0}
    for step in range(settings.max_steps):
        batch, scored, _, updates = iterate(session, roles, hybrid, prompts_of(session, world, step), sampling, step,
                                            settings, Clock())
        away = float(((scored.logprobs - batch.logprobs) * batch.response_mask).abs().max().exp()) - 1
        first = max(abs(updates[0]["ratio_max"] - 1), abs(updates[0]["approx_kl"]))
        ratio = {"ratio_error": max(ratio["ratio_error"], first),
                 "sampler_ratio_error": max(ratio["sampler_ratio_error"], session.largest(away)[0])}
    state = full_state_dict(roles.actor.module, session.is_main)
    if session.is_main:
        fitted.load_state_dict(state)
    figures = reached(world, answer_logprobs(fitted, world), case.beta)
    return {**figures, "gradient_error": error, **ratio, "steps": case.steps, "seconds": time.time() - started}, fitted


def prompts_of(session: Session, world: World, step: int) -> KitRequest:
    """The world's prompts in turn, this rank's share of them."""
    rows = session.pipeline.ppo.rollout_batch_size
    places = rank_share(torch.arange(rows), session.rank, session.world_size)
    prompt_ids, mask = world.prompt_batch(places % world.prompts)
    seeds = (session.pipeline.seed * 1_000_003 + step) * rows + places
    return KitRequest(prompt_ids=prompt_ids.to(session.device), prompt_attention_mask=mask.to(session.device),
                      row_seeds=seeds)


def small_llama(world: World) -> nn.Module:
    """One layer, 32 wide. Its first channel is a constant that makes the prompts' own tokens impossible to say, and
    attention adds nothing yet: at the start the next token depends on the last one alone."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=world.vocab + world.prompts, hidden_size=32, intermediate_size=64,
                         num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2,
                         num_labels=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight[0] = 0.0
        model.model.embed_tokens.weight.mul_(5)
        model.model.embed_tokens.weight[:, 0], model.lm_head.weight[:, 0] = 5.0, 0.0
        model.lm_head.weight[world.vocab:] = torch.tensor([-40.0] + [0.0] * 31)
    return model


def fit_reference(world: World) -> nn.Module:
    """A language model that follows the world's table. Raises RunError where it is off by more than 1e-4 nats."""
    model, rows = small_llama(world), torch.arange(world.vocab + world.prompts)[:, None]
    rows = rows if world.kind == "bigram" else rows[world.vocab:]
    table = world.table[rows[:, 0]]
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    constant = embedding.register_hook(lambda gradient: gradient * (torch.arange(gradient.shape[1]) > 0))
    optimizer = torch.optim.LBFGS([embedding, head], max_iter=400, tolerance_grad=1e-7, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logprobs = model(input_ids=rows).logits[:, 0].log_softmax(-1)[:, :world.vocab]
        distance = (table.exp() * (table - logprobs)).sum()
        distance.backward()
        return distance

    optimizer.step(loss)
    constant.remove()
    model.zero_grad()
    off = float((world.reference.exp() * (world.reference - answer_logprobs(model, world))).sum(-1).max())
    if not abs(off) < 1e-4:
        raise RunError(f"the reference model is {off:.2g} nats away from the table\n  expected: at most 1e-4\n"
                       "  change: a smaller --vocab")
    return model


@torch.no_grad()
def answer_logprobs(model: nn.Module, world: World) -> Tensor:
    """(P, N) float64 log-probabilities of every answer, by a float64 copy of the model."""
    sequences, attention_mask, mask = world.sequences()
    double, A, parts = copy.deepcopy(model).double(), world.length, []
    for rows in torch.arange(len(sequences)).split(ROWS):
        tokens = sequences[rows]
        logits = double(**model_inputs(double, tokens, attention_mask[rows])).logits[:, -A - 1:-1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, -A:, None]).squeeze(-1)
        parts.append((logprobs * mask[rows]).sum(-1))
    return torch.cat(parts).view(world.prompts, -1)


def scalar_copy(model: nn.Module) -> ScalarModel:
    """A critic with the same backbone, its head at 0."""
    from transformers import LlamaForSequenceClassification
    classifier = LlamaForSequenceClassification(model.config).eval()
    classifier.model.load_state_dict(model.model.state_dict())
    nn.init.zeros_(classifier.score.weight)
    return ScalarModel(classifier)


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


def export(model: nn.Module, world: World, folder: Path) -> None:
    """A Hugging Face folder with world.json: after `start_token_id` (or one of `prompts`) come `length` tokens of
    `token_ids`, fewer where `eos_token_id` ends the answer."""
    model.save_pretrained(folder)
    write_json(folder / "world.json", {
        **dataclasses.asdict(world), "start_token_id": world.vocab, "token_ids": list(range(world.vocab)),
        "eos_token_id": world.vocab - 1 if world.eos else None,
        "prompts": [world.prompt(p).tolist() for p in range(world.prompts)]})


if __name__ == "__main__":
    main(verify)
