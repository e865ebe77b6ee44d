"""Experience: shapes are checked, rows stay together."""

import dataclasses

import pytest
import torch

from dschat_kit.rlhf.experience import Experience


def experience(B=6, T=7, A=4):
    numbers = {name: torch.arange(B * A).view(B, A).float() + i for i, name in enumerate(
        ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"))}
    return Experience(sequences=torch.arange(B * T).view(B, T), attention_mask=torch.ones(B, T, dtype=torch.bool),
                      response_mask=torch.ones(B, A, dtype=torch.bool), scores=torch.arange(B).float(), **numbers)


def test_select_keeps_the_fields_of_a_row_together():
    whole, some = experience(), experience().select([4, 1])
    for field in dataclasses.fields(Experience):
        assert torch.equal(getattr(some, field.name), getattr(whole, field.name)[[4, 1]])


@pytest.mark.parametrize("size", [1, 4, 6, 9])
def test_split_gives_every_row_once(size):
    parts = list(experience().split(size))
    assert all(len(part) <= size for part in parts)
    assert torch.equal(torch.cat([part.sequences for part in parts]), experience().sequences)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Experience) if f.name != "sequences"])
def test_a_wrong_shape_is_named(name):
    with pytest.raises(AssertionError, match=name):
        dataclasses.replace(experience(), **{name: getattr(experience(), name)[:, None]})


def test_masks_are_bool():
    with pytest.raises(AssertionError):
        dataclasses.replace(experience(), response_mask=torch.ones(6, 4))
