"""Plain ways to the numbers that the package computes in chunks and without padding."""

import torch
from torch import Tensor

from dschat_kit.models.loading import model_inputs
from dschat_kit.rlhf.worlds import World


def response_logits(model, sequences, attention_mask, response_length):
    """(B, A, V) logits that predict the last `response_length` tokens, from a whole padded forward pass."""
    return model(**model_inputs(model, sequences, attention_mask), use_cache=False).logits[:, -response_length - 1:-1]


def token_logprobs(logits, tokens, temperature=1.0):
    """(B, A) log-probabilities of `tokens` (B, A) under `logits` (B, A, V), computed in fp64."""
    return (logits.double() / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).float()


def response_loss(logits, sequences, response_mask):
    """Cross-entropy a response token (B, T) from whole logits (B, T, V), each predicted from the position before."""
    logprobs = token_logprobs(logits[:, :-1], sequences[:, 1:]) * response_mask[:, 1:]
    return -logprobs.sum() / response_mask[:, 1:].sum()


def entropy_of(logits, temperature=1.0):
    """(B, A) entropy of the next-token distribution, in nats."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def grpo_k3_fixed_point(world: World, beta: float, steps: int = 4000) -> Tensor:
    """(1, N) log-probabilities of the answers, in the order of world.answers, where GRPO with beta times the k3
    estimate as a loss stands still: pi A / std(r) + beta (ref - pi) = 0 after every prefix, A from the reward alone.
    The expected gradient of k3 with samples held fixed is that of KL(ref || pi) of one token. For a fixed length and
    one prompt, in float64."""
    V, L = world.vocab, world.length
    rows = [world.table[V][None], *(world.table[torch.arange(V**t) % V] for t in range(1, L))]  # by prefix
    ref, policy = [row.exp() for row in rows], [row.clone() for row in rows]
    for _ in range(steps):
        probabilities, value = [row.softmax(-1) for row in policy], torch.zeros(V**L).double()
        whole = torch.ones(1).double()
        for row in probabilities:
            whole = (whole[:, None] * row).flatten()
        spread = ((whole * world.rewards[0].square()).sum() - (whole * world.rewards[0]).sum().square()).sqrt()
        for t in reversed(range(L)):
            q = world.token_rewards[0] + value.view(-1, V)
            value = (probabilities[t] * q).sum(-1)
            policy[t] = policy[t] + 0.5 * (probabilities[t] * (q - value[:, None]) / spread
                                           + beta * (ref[t] - probabilities[t]))
    whole = torch.zeros(1).double()
    for row in policy:
        whole = (whole[:, None] + row.log_softmax(-1)).flatten()
    return whole[None]
