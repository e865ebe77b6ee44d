"""PPO against the exact optimum, on the shipped functions, and that every check sees a bug made on purpose."""

import copy
import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from references import grpo_k3_fixed_point
from test_ranks import environment
from transformers import AutoModelForCausalLM

from dschat_kit import verify
from dschat_kit.config import ConfigError, Pipeline, Ppo
from dschat_kit.machine import detect
from dschat_kit.notebook.launch import free_port
from dschat_kit.rlhf import rollout
from dschat_kit.rlhf.rewards import compute_rewards, kl_estimates
from dschat_kit.rlhf.rollout import Roles
from dschat_kit.rlhf.worlds import World, WorldReward, kl_gradients, reached
from dschat_kit.runs import RunError, StageRun, write_json
from dschat_kit.train import exact, rank
from dschat_kit.train import ppo as program
from dschat_kit.train.session import Session
from dschat_kit.train.watch import Watch

FIXED, EOS = World(), World(seed=1, eos=True, prompts=2)


@pytest.fixture(scope="module")
def fitted():
    return {world: exact.fit_reference(world) for world in (FIXED, EOS)}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One rank in this process, started as train/rank.py starts them."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "ppo").mkdir()
    write_json(folder / "ppo" / "config.json", {"pipeline": Pipeline().to_dict()})
    run = StageRun(folder / "ppo")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(free_port())}.items():
            patch.setenv(name, value)
        rank.start_distributed(0)
        yield Session(run, False, sys.stderr, Watch(lambda error: 1))
        dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def solve(session, world, beta, steps, method="gae"):
    case = exact.Case(world, beta, steps, method)
    session = copy.copy(session)
    session.pipeline = case.pipeline(0, 1)
    return {"beta": beta, **exact.solve(session, case)[0]}


# -- bugs made on purpose: name -> what is put in the place of a shipped function

def more_kl(*args):
    return compute_rewards(*args[:-1], 1.2 * args[-1])


def no_kl(*args):
    return compute_rewards(*args[:-1], 0.0)


def score_early(scores, logprobs, ref_logprobs, mask, kl_coef):
    penalty = compute_rewards(scores * 0, logprobs, ref_logprobs, mask, kl_coef)
    last = mask.sum(1, keepdim=True)
    shorter = mask & ((torch.arange(mask.shape[1]) < last - 1) | (last == 1))
    return penalty + compute_rewards(scores, logprobs * 0, ref_logprobs * 0, shorter, 0.0)


def whitened_with_shift(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    return (rewards - rewards[mask].mean()) * mask


def everything_is_real(attention_mask, A):
    return torch.cat([attention_mask[:, :-A], torch.ones_like(attention_mask[:, -A:])], 1)


def no_masks(sequences, attention_mask, response_mask, *rest):
    return rollout.make_experience(sequences, everything_is_real(attention_mask, response_mask.shape[1]),
                                   torch.ones_like(response_mask), *rest)


def scored_without_masks(roles, sequences, attention_mask, A, *rest):
    return rollout.score_responses(roles, sequences, everything_is_real(attention_mask, A), A, *rest)


def k3_as_loss(actor, rows, settings, temperature, tokens):
    """As GRPO has it: no KL in the reward, the k3 estimate as a loss, weighted as the enumeration is."""
    loss, metrics = SHIPPED["actor_objective"](actor, rows, settings, temperature, tokens)
    new, _ = program.response_logprobs(actor, rows.sequences, rows.attention_mask, rows.response_mask.shape[1],
                                       temperature)
    k3 = kl_estimates(new, rows.ref_logprobs, rows.response_mask)["k3"]
    weights = (rows.logprobs * rows.response_mask).sum(1).exp()
    return loss + 0.5 * (weights * k3).sum() / tokens, metrics


SHIPPED = {name: getattr(exact, name) for name in ("actor_objective", "score_responses")}
RIGHT = {"nothing": []}
WRONG = {
    "KL x 1.2": [(rollout, "compute_rewards", more_kl)],
    "no KL": [(rollout, "compute_rewards", no_kl)],
    "k3 as loss": [(rollout, "compute_rewards", no_kl), (exact, "actor_objective", k3_as_loss)],
    "score one token early": [(rollout, "compute_rewards", score_early)],
    "gamma 0.99": [(exact, "Ppo", lambda **fields: Ppo(**fields, gamma=0.99))],
    "gamma 0.95": [(exact, "Ppo", lambda **fields: Ppo(**fields, gamma=0.95))],
    "temperature unaccounted": [
        (exact, "score_responses", lambda *args: SHIPPED["score_responses"](*args[:4], 1.0, args[5])),
        (exact, "actor_objective", lambda *args: SHIPPED["actor_objective"](*args[:3], 1.0, args[4]))],
}
WRONG_WITH_EOS = {"whitening with shift": [(rollout, "compute_rewards", whitened_with_shift)],
                  "no masks": [(exact, "score_responses", scored_without_masks),
                               (exact, "make_experience", no_masks)]}


@pytest.mark.parametrize("bug", RIGHT | WRONG | WRONG_WITH_EOS)
@pytest.mark.parametrize("world", [FIXED, EOS], ids=["fixed", "eos"])
def test_the_first_gradient_is_the_exact_one(fitted, monkeypatch, world, bug):
    for place, name, broken in (RIGHT | WRONG | WRONG_WITH_EOS)[bug]:
        monkeypatch.setattr(place, name, broken)
    errors = [exact.gradient_error(world, 0.5, fitted[world], temperature) for temperature in (1.0, 0.7)]
    if bug == "nothing" or (world is FIXED and bug in WRONG_WITH_EOS):  # harmless at fixed length
        assert max(errors) < 1e-5
    else:
        assert errors[1] > 1e-3, errors


def test_a_trained_role_checkpoints_its_activations_where_asked(session, fitted):
    model, calls = copy.deepcopy(fitted[FIXED]), []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    asked = copy.copy(session)
    asked.pipeline = exact.Case(FIXED, 0.5, 1).pipeline(0, 1)
    engine = program.trained(asked, model, 1e-3)
    asked.backward(engine, engine(input_ids=torch.tensor([[4, 1, 2]]), use_cache=False).logits.sum())
    assert len(calls) == 2  # forward, and once more in the backward pass


@pytest.mark.parametrize("world", [FIXED, EOS], ids=["fixed", "eos"])
def test_kl_estimates_of_a_real_model_stand_beside_its_true_kl(fitted, world):
    """k1 and k3 are unbiased, k2 is not; near the reference k3 varies less than k1."""
    found = {}
    for size in (0.01, 0.05):
        moved = copy.deepcopy(fitted[world])
        torch.manual_seed(0)
        for parameter in moved.parameters():
            parameter.data += size * torch.randn_like(parameter)
        found[size] = row = exact.kl_figures(moved, fitted[world], world)
        true = reached(world, exact.answer_logprobs(moved, world), 1.0)["reached_kl"]
        assert [row["kl_k1"], row["kl_k3"]] == pytest.approx([true] * 2, abs=1e-4)
    assert found[0.01]["kl_k3_std"] < 0.5 * found[0.01]["kl_k1_std"]
    assert abs(found[0.05]["kl_k2"] / true - 1) > 0.02


@given(st.permutations(range(12)), st.integers(0, 4))
@settings(deadline=None, max_examples=10)
def test_order_batch_mates_and_more_padding_change_no_experience(fitted, order, padding):
    """Prompts and answers of different lengths, some rows alone in their micro batch."""
    sequences, attention_mask, mask = (part[1::6][:12] for part in EOS.sequences())
    model = copy.deepcopy(fitted[EOS])
    model.lm_head.weight.data[:, 1:] *= 0.7  # away from its reference
    critic = exact.scalar_copy(model)
    critic.classifier.score.weight.data.fill_(0.1)
    roles = Roles(actor=model, critic=critic, ref=fitted[EOS], reward=WorldReward(EOS))

    def experience(rows, more, micro):
        wide, real = (torch.nn.functional.pad(part[rows], (more, 0)) for part in (sequences, attention_mask))
        scored = rollout.score_responses(roles, wide, real, EOS.length, 1.0, micro)
        return rollout.make_experience(wide, real, mask[rows], mask[rows].any(1), scored, Ppo(score_clip=0.0),
                                       lambda moments: moments)

    plain, other = experience(list(range(12)), 0, 12), experience(list(order), padding, 5)
    for name in ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns"):
        assert torch.allclose(getattr(plain, name)[list(order)], getattr(other, name), atol=1e-5), name
    assert plain.values.abs().max() > 0.1 and (plain.logprobs - plain.ref_logprobs).abs().max() > 0.1


# -- trained for real

def test_ppo_reaches_the_optimum(session):
    row = solve(session, EOS, 0.5, 40)
    assert [row["kl_k1"], row["kl_k3"]] == pytest.approx([row["reached_kl"]] * 2, abs=1e-3)
    assert row["kl_k3_std"] > row["kl_k1_std"]  # far from the reference: exp(-d) is seldom, but huge
    row |= {"steps": 100}  # so that beta_hat is judged as well
    assert verify.failures(row) == [], row


def dropping(session, model, lr):
    engine = program.trained(session, model, lr)
    if hasattr(model, "lm_head"):
        model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: torch.dropout(out, 0.3, True))
    return engine


class Hot(exact.HybridEngine):
    """Samples at another temperature than it was asked to."""
    def generate(self, request, sampling):
        return super().generate(request, dataclasses.replace(sampling, temperature=1.1))


@pytest.mark.parametrize("name, broken, said", [("trained", dropping, "ratio_error"),
                                                ("HybridEngine", Hot, "sampler_ratio_error")])
def test_the_ratio_checks_see_dropout_and_a_sampler_of_its_own_mind(session, monkeypatch, name, broken, said):
    """Which the gap does not: both checks are clean without the bug."""
    ratios = ("ratio_error", "sampler_ratio_error")
    assert not {text.split()[0] for text in verify.failures(solve(session, EOS, 0.5, 2))} & set(ratios)
    monkeypatch.setattr(exact, name, broken)
    assert said in {text.split()[0] for text in verify.failures(solve(session, EOS, 0.5, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("world, beta", [(World("bandit", 10, 1), 0.1), (World(vocab=2, length=5, seed=1), 1.0),
                                         (World(vocab=8, length=3, seed=2), 0.5), (World(vocab=3, length=1), 2.0)])
def test_other_sizes_reach_it_too(session, world, beta):
    row = solve(session, world, beta, 100)
    assert verify.failures(row) == [], row


@pytest.mark.slow
def test_more_epochs_and_minibatches_reach_it_too(session, monkeypatch):
    monkeypatch.setattr(exact, "Ppo", lambda **fields: Ppo(**{**fields, "mini_batch_size": 64, "micro_batch_size": 64,
                                                              "ppo_epochs": 8}))
    row = solve(session, EOS, 0.5, 30)
    assert row["gap_closed"] > 0.98 and verify.failures(row) == [], row


@pytest.mark.slow
@pytest.mark.parametrize("method, least, most", [("rloo", 0.99, 1), ("grpo", 0.99, 1), ("reinforce", 0.99, 1),
                                                 ("dpo", 0.95, 1)])
def test_what_the_other_methods_converge_to(session, method, least, most):
    """They reach the optimum; DPO as far as its pairs tell of it."""
    assert least < solve(session, FIXED, 0.5, 40, method=method)["gap_closed"] < most


@pytest.mark.slow
@pytest.mark.parametrize("beta, gap", [(0.5, 0.881), (2.0, 0.962)])
def test_grpo_with_its_kl_as_a_k3_loss_goes_to_its_own_fixed_point(session, beta, gap):
    expected = reached(FIXED, grpo_k3_fixed_point(FIXED, beta), beta)
    row = solve(session, FIXED, beta, 100, method="grpo k3")
    assert expected["gap_closed"] == pytest.approx(gap, abs=1e-3)
    assert row["gap_closed"] == pytest.approx(expected["gap_closed"], abs=0.02)
    assert row["reached_reward"] == pytest.approx(expected["reached_reward"], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("bug, said", [
    ("KL x 1.2", "beta_hat"), ("no KL", "beta_hat"), ("score one token early", "gap_closed"),
    ("whitening with shift", "gap_closed"), ("no masks", "gap_closed"), ("temperature unaccounted", "ratio_error")])
def test_training_with_a_bug_fails_its_check(session, monkeypatch, bug, said):
    wrong = {**WRONG, **WRONG_WITH_EOS,
             "no masks": [(program, "score_responses", scored_without_masks), (program, "make_experience", no_masks)],
             "temperature unaccounted": [(program, "actor_objective", lambda *args: SHIPPED["actor_objective"](
                 *args[:3], 0.7, args[4]))]}
    for place, name, broken in wrong[bug]:
        monkeypatch.setattr(place, name, broken)
    failed = verify.failures(solve(session, EOS, 0.5, 100))
    assert any(text.startswith(said) for text in failed), failed


# -- the command

def dschat_verify(*options: str) -> subprocess.CompletedProcess:
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the session in this process
    return subprocess.run([sys.executable, "-m", "dschat_kit.cli", "verify", *options], text=True, capture_output=True,
                          env={name: value for name, value in environment().items() if name not in ours}, timeout=600)


@pytest.mark.ranks
def test_two_ranks_reach_it_and_anybody_can_enumerate_the_export(tmp_path):
    """As the command line says it; the export is judged with plain transformers and nothing of ours."""
    asked = "--world bigram --vocab 4 --length 3 --beta 0.5 --seed 0 --steps 60 --ranks 2 --zero 2 --json".split()
    done = dschat_verify(*asked, "--export", str(tmp_path / "policy"))
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)
    assert row["highest_reward"] - 0.01 < row["reached_reward"] <= row["highest_reward"] + 1e-6
    assert row["failed"] == [] and row["ranks"] == 2 and row["zero"] == 2 and row["steps"] == 60
    assert row["reference_reward"] == pytest.approx(-0.10254, abs=1e-5)
    assert row["optimal_value"] == pytest.approx(1.881807 - 0.5 * 1.724266, abs=1e-5)

    told = json.loads((tmp_path / "policy" / "world.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").double().eval()
    ids = torch.tensor([[told["start_token_id"], a, b, c] for a in told["token_ids"] for b in told["token_ids"]
                        for c in told["token_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(1)
    assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-9)
    reward = ((ids == 1).sum(1) - (ids == 2).sum(1)).double()
    assert float((logprobs.exp() * reward).sum()) == pytest.approx(row["reached_reward"], abs=1e-9)
    kl = float((logprobs.exp() * (logprobs - World().reference[0])).sum())
    assert kl == pytest.approx(row["reached_kl"], abs=1e-9)
    assert row["reached_value"] == pytest.approx(row["reached_reward"] - 0.5 * kl) and row["gap_closed"] > 0.98


@pytest.mark.parametrize("options", [{"vocab": 1}, {"vocab": 501, "length": 1}, {"length": 0}, {"betas": (0.0,)},
                                     {"betas": (math.nan,)}, {"prompts": 0}, {"steps": 0}, {"vocab": 8, "length": 9},
                                     {"kind": "bandit", "length": 2}, {"seed": -1}])
def test_a_world_that_is_none_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        verify.plan(**options)
    with pytest.raises(ConfigError, match="divisor of 256"):
        verify.launch_cases(verify.plan(), ranks=3)
    if detect().devices < 256:
        with pytest.raises(ConfigError, match="--ranks: got 256(.|\n)*change:   --ranks [0-9]+$"):
            verify.launch_cases(verify.plan(), ranks=256)
    with pytest.raises(RunError, match="cannot write /proc/nothing"):  # before anything is trained
        verify.launch_cases(verify.plan(), export=Path("/proc/nothing"))


def test_slopes_and_failures_tell_wrong_numbers():
    rows = [{"beta": beta, **(row := reached(FIXED, FIXED.best(beta), beta)), "gradient_error": 1e-7,
             "ratio_error": 0.0, "sampler_ratio_error": 0.0, "steps": 100,
             "highest_reward": FIXED.highest_reward(row["reached_kl"])} for beta in (0.1, 0.5, 1.0, 2.0)]
    assert max(map(abs, verify.slope_errors(rows))) < 1e-9 and not any(verify.failures(row) for row in rows)
    moved = [{**row, **reached(FIXED, FIXED.best(1.2 * row["beta"]), row["beta"])} for row in rows]  # as KL x 1.2 does
    assert min(map(abs, verify.slope_errors(moved))) > 0.1
    assert all(any(text.startswith("beta_hat") for text in verify.failures(row)) for row in moved if row["beta"] >= 0.5)
    for name, wrong in {"gap_closed": 0.97, "reached_value": 9.0, "reached_reward": 1.9, "beta_hat": 0.6,
                        "gradient_error": 1e-3, "ratio_error": 1e-3, "sampler_ratio_error": 1e-3}.items():
        assert [text.split()[0] for text in verify.failures({**rows[1], name: wrong})] == [name]


def test_the_figure_shows_theory_and_what_was_reached():
    rows = [{**dataclasses.asdict(FIXED), "beta": beta, "method": "gae", "frontier": FIXED.frontier(), "ranks": 1,
             **reached(FIXED, FIXED.best(beta), beta)} for beta in (0.5, 1.0)]
    axes, = verify.figure(rows).axes
    curve, *points = axes.lines
    assert len(curve.get_xdata()) == 40 and list(curve.get_ydata()) == sorted(curve.get_ydata())
    assert {row["reached_kl"] for row in rows} <= {float(point.get_xdata()[0]) for point in points}


def test_methods_are_planned_launched_side_by_side_and_drawn(tmp_path, monkeypatch):
    def launched(cases):
        return {"kl_gradients": kl_gradients(), "cases": [
            {**case["world"], **case, **reached(FIXED, FIXED.best(2 * case["beta"]), case["beta"]),
             "frontier": FIXED.frontier(), "gradient_error": 0.0} for case in cases]}

    monkeypatch.setattr(verify, "launch_cases", launched)
    rows = verify.compare(tmp_path, betas=(0.5, 2.0), steps=10)
    assert [row["method"] for row in rows] == [*verify.METHODS, *verify.METHODS[:6]]
    assert [row["beta"] for row in rows] == [0.5] * 10 + [2.0] * 6 and (tmp_path / "methods.png").exists()
    axes, = verify.figure(rows).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["exact optimum", *verify.METHODS[:6], "best of n"] and "gap closed" in verify.line(rows[0])
    found = json.loads((tmp_path / "methods.json").read_text())["kl_gradients"]
    panels = verify.gradient_figure(found).axes
    on = [bool(np.allclose(*axes.lines[1].get_data())) for axes in panels]
    assert dict(zip([axes.get_title() for axes in panels], on, strict=True)) == {
        "k1 in the reward": True, "k2 as a loss": True, "k1 as a loss": False, "k3 as a loss": False}


# -- minibatches

@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_which_rows_meet_in_a_minibatch_depends_on_no_number_of_ranks(world_size, per_rank, count, seed):
    size = 12 * per_rank  # divides by 1, 2, 3 and 4

    @dataclasses.dataclass
    class Rows:
        rows: list

        def __len__(self):
            return len(self.rows)

        def select(self, index):
            return [self.rows[i] for i in index]

    def of(ranks, step=0, epoch=0):
        ppo = Ppo(rollout_batch_size=size * count, mini_batch_size=size, micro_batch_size=1)
        sessions = [SimpleNamespace(rank=rank, world_size=ranks, pipeline=Pipeline(seed=seed, ppo=ppo))
                    for rank in range(ranks)]
        parts = [program.minibatches(one, Rows(list(range(size * count))[one.rank::ranks]), step, epoch)
                 for one in sessions]
        return [sorted(sum(shares, [])) for shares in zip(*parts, strict=True)]

    assert of(world_size) == of(1) and sorted(sum(of(1), [])) == list(range(size * count))
    assert count < 3 or of(1) != of(1, epoch=1) and of(1) != of(1, step=1)
