"""Talking to an exported model."""

import json

import pytest
import torch
from tiny_models import folder

from dschat_kit.chat import ChatSession, compare
from dschat_kit.runs import RunError


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return ChatSession(folder(tmp_path_factory.mktemp("model"), "llama"), max_new_tokens=8)


def test_loading_is_silent(tmp_path, capfd):
    folder(tmp_path)
    capfd.readouterr()
    ChatSession(tmp_path)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_answers_do_not_depend_on_batch_mates_and_streaming(session):
    questions = ["moo?", "what does the cow eat?"]
    answers = session.ask_all(questions)
    assert answers == [session.ask(question) for question in questions]
    assert "".join(session.stream(questions[1], remember=False)).strip() == answers[1]
    rows = [{"question": question, "a": answer} for question, answer in zip(questions, answers, strict=True)]
    assert compare({"a": session}, questions) == rows


def test_a_tokenizer_without_a_pad_token_answers_several_questions(session, tmp_path):
    path = folder(tmp_path, "llama") / "tokenizer_config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items()
                                if name != "pad_token"}))
    assert ChatSession(tmp_path, max_new_tokens=8).ask_all(["moo?", "hay?"]) == session.ask_all(["moo?", "hay?"])


def test_seed_and_temperature(session):
    answers = {session.ask("moo?", temperature=1.0, seed=seed) for seed in range(4)}
    assert len(answers) > 1 and session.ask("moo?", temperature=1.0, seed=2) in answers
    state = torch.get_rng_state()
    assert session.ask("moo?") == session.ask("moo?") and torch.equal(state, torch.get_rng_state())


def test_a_remembered_turn_is_context_of_the_next(session):
    plain = session.ask("hay?")
    list(session.stream("moo?"))
    again = "".join(session.stream("hay?", remember=False)).strip()
    assert session.history[0] == ("user", "moo?") and len(session.history) == 2 and again != plain
    session.history = []
    assert "".join(session.stream("hay?", remember=False)).strip() == plain


@pytest.mark.parametrize("question", ["", "  \n", "moo " * 400])
def test_a_question_that_cannot_be_answered_is_said(session, question):
    with pytest.raises(RunError, match="expected"):
        session.ask(question)
    with pytest.raises(RunError, match="expected"):
        list(session.stream(question))


def test_a_run_without_a_model_is_named(tmp_path):
    with pytest.raises(RunError, match="no exported model of ppo or dpo or sft"):
        ChatSession.open(tmp_path)
    with pytest.raises(RunError, match="change: `dschat dpo --run-root"):
        ChatSession.open(tmp_path, "dpo")
