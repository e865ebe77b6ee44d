"""Plain ways to the numbers that the package computes in chunks and without padding."""

from dschat_kit.models.loading import model_inputs


def response_logits(model, sequences, attention_mask, response_length):
    """(B, A, V) logits that predict the last `response_length` tokens, from a whole padded forward pass."""
    return model(**model_inputs(model, sequences, attention_mask), use_cache=False).logits[:, -response_length - 1:-1]


def entropy_of(logits, temperature=1.0):
    """(B, A) entropy of the next-token distribution, in nats."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
