"""The exact text that a model reads."""

import json
import os
from pathlib import Path

import pytest

from dschat_kit.data.prompts import ASSISTANT, HUMAN, prompt_text, question_of, response_text


@pytest.mark.parametrize("text, expected", [
    ("why?", "\n\nHuman: why?\n\nAssistant:"),
    ("  why? \n", "\n\nHuman: why?\n\nAssistant:"),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"),
    ("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a\n\nAssistant:"),
])
def test_every_prompt_ends_where_the_assistant_speaks(text, expected):
    assert prompt_text(text) == expected
    assert prompt_text(prompt_text(text)) == expected  # nothing is added twice


def test_a_response_follows_after_one_space():
    assert response_text("  yes.\n") == " yes." == response_text(response_text("yes."))


def test_the_question_is_what_the_human_said_last():
    assert question_of(prompt_text("why?")) == "why?"
    assert question_of(prompt_text(f"{HUMAN} a{ASSISTANT} b{HUMAN} c")) == "c"


@pytest.mark.skipif("DSCHAT_DATA" not in os.environ, reason="DSCHAT_DATA names no folder with real rows")
def test_real_rows_are_in_this_form_already():
    file = Path(os.environ["DSCHAT_DATA"], "hh_helpful_256", "eval.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert all(prompt_text(row["prompt"]) == row["prompt"] for row in rows)
    assert sum(response_text(row["chosen"]) == row["chosen"] for row in rows) > 0.9 * len(rows)
