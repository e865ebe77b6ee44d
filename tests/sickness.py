"""Sicknesses by name, as patches of the shipped functions, for runs that are made sick on purpose."""

import copy
import dataclasses
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.replica import Replica
from dschat_kit.metrics import JsonlWriter
from dschat_kit.rlhf import rollout
from dschat_kit.train import ppo, prompts, sft


def sampler(**other) -> Callable:
    """The engine samples otherwise than it was asked to."""
    def make(patch) -> None:
        generate = HybridEngine.generate
        patch.setattr(HybridEngine, "generate", lambda self, request, sampling: generate(
            self, request, dataclasses.replace(sampling, **other)))
    return make


def stale(patch) -> None:
    """The engine generates with the weights of the first rollout for ever."""
    fill, kept = Replica.fill, []

    def filled(self):
        if not kept:
            model = fill(self)
            for module in self._packed:  # what oneDNN has ordered cannot be copied
                module.packed = None
            kept.append(copy.deepcopy(model))
        return kept[0]

    patch.setattr(Replica, "fill", filled)


def dropout(patch) -> None:
    """The actor drops activations while it trains."""
    build = ppo.build_roles

    def built(*args):
        roles = build(*args)
        roles.actor.module.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.3))
        return roles

    patch.setattr(ppo, "build_roles", built)


def early_score(patch) -> None:
    """The score is read one token early."""
    def scores(reward, sequences, attention_mask):
        values = reward(sequences, attention_mask)
        last = (attention_mask * torch.arange(attention_mask.shape[1])).argmax(1, keepdim=True)
        return values.gather(1, last - 1).squeeze(1)

    patch.setattr(rollout, "response_scores", scores)
    patch.setattr(prompts, "response_scores", scores)


def long_is_good(patch) -> None:
    """The reward model likes nothing but length."""
    patch.setattr(rollout, "response_scores", lambda reward, sequences, attention_mask: attention_mask.sum(1) * 0.3)


def growing(patch) -> None:
    """The reward model's scores double every time it is asked."""
    calls, scores = itertools.count(), rollout.response_scores
    patch.setattr(rollout, "response_scores", lambda *args: scores(*args) * 2 ** next(calls))


def worthless(patch) -> None:
    """The reward model says the same of everything."""
    patch.setattr(rollout, "response_scores", lambda reward, sequences, attention_mask: attention_mask.sum(1) * 0.0)


def unshifted(patch) -> None:
    """The shift to mean 0 is lost on the way from the reward stage."""
    scores = rollout.response_scores
    patch.setattr(rollout, "response_scores", lambda *args: scores(*args) + 9)
    patch.setattr(prompts, "response_scores", lambda *args: scores(*args) + 9)


def backwards(patch) -> None:
    """Advantages have the wrong sign: the policy climbs down."""
    whiten = rollout.whiten
    patch.setattr(rollout, "whiten", lambda *args, **how: -whiten(*args, **how))


def mute(patch) -> None:
    """Metrics are no longer written after the second step."""
    write = JsonlWriter.write
    patch.setattr(JsonlWriter, "write", lambda self, row: None if row["step"] > 2 and "phase" not in row else
                  write(self, row))


def unwhitened(patch) -> None:
    """Advantages stay as large as they are."""
    patch.setattr(rollout, "whiten", lambda values, mask, moments, shift_mean=True: values * mask)


def eos_masked(patch) -> None:
    """The last token of a response, EOS, is taken for padding: no loss on it."""
    make = sft.sft_batch

    def batch(rows, pad_id):
        made = make(rows, pad_id)
        return dataclasses.replace(made, response_mask=made.response_mask & made.response_mask.roll(-1, 1))

    patch.setattr(sft, "sft_batch", batch)


SICKNESSES = {"filtered": sampler(top_k=2), "greedy": sampler(temperature=0.0), "hot": sampler(temperature=2.0),
              "stale": stale, "dropout": dropout, "early score": early_score, "long is good": long_is_good,
              "growing": growing, "unwhitened": unwhitened, "eos masked": eos_masked,
              "worthless": worthless, "unshifted": unshifted, "backwards": backwards, "mute": mute}
