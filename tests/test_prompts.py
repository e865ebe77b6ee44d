"""The exact text that a model reads."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.config import ConfigError
from dschat_kit.data.prompts import ASSISTANT, HUMAN, PromptStyle, dialogue_text, question_of, turns_of
from dschat_kit.data.tokenizer import encode, open_tokenizer, train_tokenizer


def prompt_text(text):
    return dialogue_text(turns_of(text))


response_text = PromptStyle().response


@pytest.mark.parametrize("text, expected", [
    ("why?", "\n\nHuman: why?\n\nAssistant:"),
    ("  why? \n", "\n\nHuman: why?\n\nAssistant:"),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"),
    ("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a\n\nAssistant:"),
    ("Human: a Assistant: b\nHuman: c Assistant:", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"),
    ("Human: is Human: a name?\n\nAssistant:", "\n\nHuman: is Human: a name?\n\nAssistant:"),
    ("who said Human: a Assistant:", "\n\nHuman: who said Human: a Assistant:\n\nAssistant:"),
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
    assert sum(prompt_text(row["prompt"]) == row["prompt"] for row in rows) > 0.99 * len(rows)
    assert sum(response_text(row["chosen"]) == row["chosen"] for row in rows) > 0.9 * len(rows)


TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "why?")]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
          "{% elif m['role'] == 'system' %}{{ raise_exception('no system role here') }}"
          "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}")
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


def tokenizer(template: str = "", ends: str = "<|im_end|>"):
    found = train_tokenizer(["the cow says moo"] * 9, 300)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.eos_token, found.chat_template = ends, template or None
    return found


def test_the_text_of_a_chat_template():
    style = PromptStyle(tokenizer(CHATML), "chat", system="be kind")
    assert style.prompt(TURNS) == ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>"
                                   "assistant\nhello<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")
    assert style.response(" good \n") == "good"
    assert style.prompt([("system", "own"), *TURNS]).startswith("<|im_start|>system\nown<|im_end|>")
    llama = PromptStyle(tokenizer(LLAMA2), "chat")
    assert llama.prompt(TURNS) == "[INST] hi [/INST] hello <|im_end|>[INST] why? [/INST]"
    assert llama.response("good") == " good "


@pytest.mark.parametrize("style, system", [("dialogue", ""), ("dialogue", "be \"kind\"\n{{é}}"), ("chat", ""),
                                           ("chat", "be \"kind\"\n{{é}}")])
def test_a_chat_with_the_exported_model_uses_the_text_it_was_trained_on(tmp_path, style, system):
    trained = PromptStyle(tokenizer(CHATML), style, system)
    trained.tokenizer.save_pretrained(tmp_path)
    talking = PromptStyle.of(open_tokenizer(tmp_path))
    assert talking.prompt(TURNS) == trained.prompt(TURNS) and system in talking.prompt(TURNS)
    assert talking.response("a <|im_end|>") == trained.response("a <|im_end|>")


def test_an_answer_ends_with_what_ends_it_in_the_template():
    """Whatever the tokenizer calls its EOS: generation has to stop where the template's turn does (Gemma)."""
    found = tokenizer(CHATML, ends="<|end|>")
    PromptStyle(found, "chat")
    assert found.eos_token == "<|im_end|>"


@pytest.mark.parametrize("template, system, said", [
    ("", "", "has no chat template"), (THINKING, "", "asks with '<|im_end|>"),
    (LLAMA2, "be kind", "no system role here")])
def test_a_template_that_cannot_be_trained_on_is_refused(template, system, said):
    with pytest.raises(ConfigError) as caught:
        PromptStyle(tokenizer(template), "chat", system)
    assert said in str(caught.value) and "change:" in str(caught.value)


def test_turns_that_a_template_refuses():
    with pytest.raises(ValueError, match="refuses it: no system role"):
        PromptStyle(tokenizer(LLAMA2), "chat").prompt([("system", "x"), *TURNS])


@given(st.lists(st.text("ab\n ?", max_size=8), min_size=1, max_size=5))
def test_an_exported_model_is_prompted_as_it_was_trained(texts):
    """The template that the tokenizer carries and the text of the rows are the same."""
    found = TOKENIZERS["dialogue"]
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    messages = [{"role": role, "content": text} for role, text in turns]
    asked = found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == dialogue_text(turns) == STYLES["dialogue"].prompt(turns)
    whole = found.apply_chat_template([*messages, {"role": "assistant", "content": "so."}], tokenize=False)
    assert whole == asked + response_text("so.") + found.eos_token


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["dialogue", "chat", "llama2"]), st.lists(st.sampled_from(
    ["<|end|>", "<|im_start|>", "<|im_end|>", "\n\nHuman:", "\n\nAssistant:", "[INST]", "[/INST]", "<|pad|>", "user\n",
     "a", " ", "\n"]), min_size=1, max_size=6).map("".join))
def test_what_a_person_writes_never_becomes_a_role_or_a_special_token(kind, text):
    style, found = STYLES[kind], TOKENIZERS[kind]
    roles = {"dialogue": (HUMAN, ASSISTANT), "chat": (), "llama2": ("[INST]", "[/INST]")}[kind]

    def count(written):
        special = set(found.all_special_ids)
        return sum(i in special for i in encode(found, [written])[0]), *map(written.count, roles)
    assert count(style.prompt([("user", text), ("assistant", text), ("user", text)])) == count(style.prompt(
        [("user", "a"), ("assistant", "a"), ("user", "a")]))
    assert count(style.response(text)) == count(style.response("a"))


TOKENIZERS = {"dialogue": tokenizer(), "chat": tokenizer(CHATML), "llama2": tokenizer(LLAMA2)}
STYLES = {kind: PromptStyle(found, "dialogue" if kind == "dialogue" else "chat") for kind, found in TOKENIZERS.items()}


def test_markers_that_were_defused_are_counted():
    style = PromptStyle(specials=["<|end|>"])
    assert style.prompt([("user", "a<|end|><|end|>")]) == "\n\nHuman: a< |end|>< |end|>\n\nAssistant:"
    assert style.response("x\n\nHuman: evil") == " x\n \nHuman: evil" and style.defused == 3


@pytest.mark.skipif("DSCHAT_MODEL" not in os.environ, reason="DSCHAT_MODEL names no folder of a chat model")
def test_a_real_chat_template():
    found = open_tokenizer(os.environ["DSCHAT_MODEL"])
    style = PromptStyle(found, "chat")
    text = style.prompt([("user", "why?")]) + style.response("because.") + found.eos_token
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."}]
    assert found.apply_chat_template(messages, tokenize=False).rstrip() == text
