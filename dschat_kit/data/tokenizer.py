"""The tokenizer of a pass: the model's own, or a byte-level BPE trained on the SFT rows for a model from scratch."""

from collections.abc import Iterable
from pathlib import Path

from dschat_kit.data.sources import DataError

PAD, EOS = "<|pad|>", "<|end|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE (Sennrich et al. 2016) with distinct pad and EOS tokens, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS,
                                   clean_up_tokenization_spaces=False)


def open_tokenizer(name: str | Path):
    """The tokenizer of a model folder or Hub name. Raises DataError when it has no EOS: responses could never end."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.name: {str(name)!r} has no tokenizer that can be loaded: "
                        f"{str(error).partition(chr(10))[0]}\n  expected: a folder or Hub name of a causal language "
                        "model\n  change: --set model.name=PATH") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {name} has no EOS token\n  expected: one, which ends every response\n"
                        "  change: set eos_token in its tokenizer_config.json")
    return tokenizer


def require_same_tokenizer(actor, reward: str | Path) -> None:
    """Raises DataError unless the model folder `reward` reads text as the actor's tokenizer does: PPO hands the
    actor's tokens, not text, to the reward model and the critic."""
    other = open_tokenizer(reward)
    ours, theirs = actor.get_vocab(), other.get_vocab()
    differ = [token for token, number in ours.items() if theirs.get(token) != number]
    if differ or actor.eos_token_id != other.eos_token_id:
        raise DataError(f"reward.model: {str(reward)!r} has another tokenizer than the actor ({len(differ)} of "
                        f"{len(ours)} tokens differ)\n  expected: the same tokens with the same ids and the same EOS: "
                        "the reward model reads the actor's tokens\n  change:   --set reward.model= (the SFT model)")


def pad_id_of(tokenizer) -> int:
    """The id that fills batches: the pad token, or EOS where there is none. Masks, never ids, say what is padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of many texts, nothing added, on all cores where the tokenizer is one of the tokenizers library."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    inner = tokenizer.backend_tokenizer  # without what transformers adds to ids: masks, offsets, copies of lists
    inner.no_truncation(), inner.no_padding()
    return [found.ids for found in inner.encode_batch_fast(texts, add_special_tokens=False)]
