"""The models of a world that can be enumerated: a small Llama fitted to its reference, what it says of every answer,
a critic beside it, and its export."""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from dschat_kit.models.loading import model_inputs
from dschat_kit.models.scalar_model import ScalarModel
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.rlhf.rewards import kl_estimates
from dschat_kit.rlhf.worlds import World
from dschat_kit.runs import RunError, write_json

ROWS = 8192
"""Enumerated answers of one forward pass."""


def small_llama(world: World) -> nn.Module:
    """One layer, 32 wide, or as wide as a bigram table has rows. Its first channel is a constant that makes the
    prompts' own tokens impossible to say, and attention adds nothing yet: at the start the next token depends on the
    last one alone."""
    from transformers import LlamaConfig, LlamaForCausalLM
    width = max(32, -(-(world.vocab + world.prompts + 1) // 8) * 8 if world.kind == "bigram" else 0)
    config = LlamaConfig(vocab_size=world.vocab + world.prompts, hidden_size=width, intermediate_size=2 * width,
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
        model.lm_head.weight[world.vocab:] = torch.tensor([-40.0] + [0.0] * (width - 1))
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


@torch.no_grad()
def kl_figures(model: nn.Module, ref: nn.Module, world: World) -> dict[str, float]:
    """Mean and standard deviation, over all answers, of the loop's KL estimates of one answer; the KL itself is
    reached_kl."""
    sequences, attention_mask, mask = world.sequences()
    sums: dict[str, Tensor] = {}
    for rows in torch.arange(len(sequences)).split(ROWS):
        logprobs, others = (response_logprobs(some, sequences[rows], attention_mask[rows], world.length)[0].double()
                            for some in (model, ref))
        chances = logprobs.sum(1).exp() / world.prompts
        for name, values in kl_estimates(logprobs, others, mask[rows]).items():
            sums[name] = sums.get(name, 0) + torch.stack([(chances * values).sum(), (chances * values.square()).sum()])
    return {key: value for name, (mean, square) in sums.items() for key, value in
            ((f"kl_{name}", float(mean)), (f"kl_{name}_std", max(float(square - mean**2), 0.0) ** 0.5))}


def scalar_copy(model: nn.Module) -> ScalarModel:
    """A critic with the same backbone, its head at 0."""
    from transformers import LlamaForSequenceClassification
    classifier = LlamaForSequenceClassification(model.config).eval()
    classifier.model.load_state_dict(model.model.state_dict())
    nn.init.zeros_(classifier.score.weight)
    return ScalarModel(classifier)


def export(model: nn.Module, world: World, folder: Path) -> None:
    """A Hugging Face folder with world.json: after `start_token_id` (or one of `prompts`) come `length` tokens of
    `token_ids`, fewer where `eos_token_id` ends the answer."""
    model.save_pretrained(folder)
    write_json(folder / "world.json", {
        **dataclasses.asdict(world), "start_token_id": world.vocab, "token_ids": list(range(world.vocab)),
        "eos_token_id": world.vocab - 1 if world.eos else None,
        "prompts": [[world.vocab + p] * (p + 1) for p in range(world.prompts)]})
