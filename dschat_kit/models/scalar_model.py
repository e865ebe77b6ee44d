"""A backbone with a scalar head: `values` for the critic, `scores` for the reward model.

It is transformers' own sequence classifier inside, so that an exported reward model loads in plain transformers:
score = (logit - config.score_shift) * config.score_scale.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from dschat_kit.config import ConfigError, Model
from dschat_kit.models.loading import left_aligned, load_config, load_pretrained, model_inputs, response_columns


def last_token(values: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) the entry of `values` (B, T) at the last real token of each sequence, wherever padding stands."""
    positions = torch.arange(attention_mask.shape[1], device=values.device).expand_as(attention_mask)
    last = positions.masked_fill(~attention_mask, -1).amax(1)
    return values.gather(1, last.clamp(min=0)[:, None]).squeeze(1)


def scalars(backbone: nn.Module, head: nn.Module, sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) fp32: the head at every position of the backbone's last hidden states."""
    hidden = backbone(**model_inputs(backbone, sequences, attention_mask), use_cache=False).last_hidden_state
    return head(hidden).squeeze(-1).float()


class ScalarModel(nn.Module):
    """One scalar a position: (head(hidden) - shift) * scale."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier
        self.shift = float(getattr(classifier.config, "score_shift", 0.0))
        self.scale = float(getattr(classifier.config, "score_scale", 1.0))

    def forward(self, sequences: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T) fp32 scalars; the one at the last real token is the score of a response. Rows that begin in the first
        column need no mask."""
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        return (scalars(backbone, self.classifier.score, sequences, attention_mask) - self.shift) * self.scale

    def normalise(self, shift: float, scale: float) -> None:
        """From now on scores are moved by -shift, then multiplied by scale, on top of what holds already; config.json
        keeps it."""
        self.shift, self.scale = self.shift + shift / self.scale, self.scale * scale
        self.classifier.config.score_shift, self.classifier.config.score_scale = self.shift, self.scale


def response_values(critic: nn.Module, sequences: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """(B, A) values before each of the last `response_length` tokens: V(s_t) is read where token t is predicted."""
    values = critic(left_aligned(sequences, attention_mask), None)
    return values.gather(1, response_columns(attention_mask, response_length))


def response_scores(reward: nn.Module, sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) the scalar at the last real token of each sequence."""
    values = reward(left_aligned(sequences, attention_mask), None)
    return values.gather(1, attention_mask.sum(1, keepdim=True) - 1).squeeze(1)


def load_scalar_model(source: str | Path, settings: Model, seed: int, new_head: bool,
                      gathered=nullcontext) -> ScalarModel:
    """A scalar model from a folder. `new_head` draws the head from N(0, 1/(d+1)) (Stiennon et al. 2020) over any
    causal model's backbone; otherwise the folder must hold a trained head. `gathered(weight)` is a context in which a
    weight that was sharded while loading is whole. Raises ConfigError for another folder."""
    from transformers import AutoModelForSequenceClassification
    expected = "a whole model folder of a family with a sequence classifier in transformers"
    config = load_config(source)
    config.num_labels = 1
    if new_head:  # what an older head's scores were moved by says nothing of this one's
        config.score_shift, config.score_scale = 0.0, 1.0
    if config.pad_token_id == config.eos_token_id:
        config.pad_token_id = None  # plain transformers would read the score before EOS, taking EOS for padding
    classifier, missing = load_pretrained(AutoModelForSequenceClassification, source, config, settings, expected)
    missing = [name for name in missing if not (new_head and name.startswith("score."))]
    if missing or not hasattr(classifier, "score"):
        raise ConfigError(f"{source}: has no weights for {', '.join(missing[:3]) or 'a head named score'}\n"
                          f"  expected: {expected}\n  change:   --set model.name=PATH")
    if new_head:
        weight = classifier.score.weight
        with torch.no_grad(), torch.random.fork_rng(devices=[]), gathered(weight):
            torch.manual_seed(seed)
            weight.copy_(torch.randn(weight.shape) * (weight.shape[1] + 1) ** -0.5)
    return ScalarModel(classifier)
