"""Rows of the exact published schemas -> pairs. Every format and every named data set has its row here."""

import pytest

from dschat_kit.data.formats import FORMATS, HUB, BadRow, guess

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "why?")]
WHY = [("user", "why?")]
UID = "b2f6a3f8"


def chat(*said):
    return [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(said)]


MIRACL = {"query_id": "12#0", "query": "why?", "emb": [0.5],
          "positive_passages": [{"docid": "1#0", "text": "good", "title": "t"}],
          "negative_passages": [{"docid": "2#0", "text": "bad", "title": "t"}]}
MKQA = {"example_id": "1", "query": "why?",
        "queries": {"zh_cn": "为什么?", "ja": "なぜ?", "en": "why?"},
        "answers": {"zh_cn": [{"type": 0, "entity": "Q1", "text": "好", "aliases": []}],
                    "ja": [{"type": 0, "entity": "Q1", "text": "良い", "aliases": []}]}}
WEBGPT = {"dataset": "eli5", "question": {"dataset": "eli5", "id": "1", "full_text": "why?"},
          "quotes_0": {"title": [], "extract": []}, "answer_0": "bad [1]", "tokens_0": {"prefix": [], "completion": []},
          "score_0": -0.5, "quotes_1": {"title": [], "extract": []}, "answer_1": "good (2, 3) answer",
          "tokens_1": {"prefix": [], "completion": []}, "score_1": 0.5}
SHP = {"post_id": "x", "domain": "askculinary_train", "upvote_ratio": 0.9, "history": "why?", "c_root_id_A": "a",
       "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 3, "score_B": 10,
       "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "seconds_difference": 1.0, "score_ratio": 3.3}
JAQUAD = {"answer": "good", "question": "why?", "sentence": "good sentence", "paragraph": "a paragraph",
          "sentence_answer": "x", "paragraph_answer": "x", "paragraph_sentence": "x", "paragraph_id": "1"}
ULTRA = {"prompt": "why?", "prompt_id": UID, "chosen": chat("why?", "good"), "rejected": chat("why?", "bad"),
         "messages": chat("why?", "good"), "score_chosen": 8.0, "score_rejected": 6.5}
ALPACA = {"instruction": "why", "input": "this?", "output": "good", "text": "Below is an instruction"}
DOLLY = {"instruction": "why?", "context": "", "response": "good", "category": "open_qa"}

PUBLISHED = {
    "Dahoas/rm-static": ({"prompt": HH, "response": " good", "chosen": " good", "rejected": " bad"}, TURNS, "good",
                         "bad"),
    "Dahoas/full-hh-rlhf": ({"prompt": HH, "response": " good", "chosen": " good", "rejected": " bad"}, TURNS, "good",
                            "bad"),
    "Dahoas/synthetic-instruct-gptj-pairwise": ({"prompt": "why?", "chosen": "good", "rejected": "bad"}, WHY, "good",
                                                "bad"),
    "yitingxie/rlhf-reward-datasets": ({"prompt": "\n\nHuman: why?\n\n", "chosen": "Assistant: good",
                                        "rejected": "Assistant: bad"}, WHY, "good", "bad"),
    "openai/webgpt_comparisons": (WEBGPT, WHY, "good answer", "bad"),
    "stanfordnlp/SHP": (SHP, WHY, "good", "bad"),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": ({"prompt": "USER: hi ASSISTANT: hello</s>USER: why? ASSISTANT:",
                                                "label": "good</s>"}, TURNS, "good", ""),
    "wangrui6/Zhihu-KOL": ({"INSTRUCTION": "why?", "RESPONSE": "good", "SOURCE": "Zhihu", "METADATA": "{}"}, WHY,
                           "good", ""),
    "Cohere/miracl-zh-queries-22-12": (MIRACL, WHY, "good", "bad"),
    "Cohere/miracl-ja-queries-22-12": (MIRACL, WHY, "good", "bad"),
    "Hello-SimpleAI/HC3-Chinese": ({"id": "0", "question": "why?", "human_answers": ["good", "other"],
                                    "chatgpt_answers": ["bad"], "source": "baike"}, WHY, "good", ""),
    "mkqa-Chinese": (MKQA, [("user", "为什么?")], "好", ""),
    "mkqa-Japanese": (MKQA, [("user", "なぜ?")], "良い", ""),
    "lmqg/qg_jaquad": (JAQUAD, WHY, "good sentence", ""),
    "lmqg/qag_jaquad": ({"answers": ["good"], "questions": ["why?", "how?"], "paragraph": "good", "paragraph_id": "1",
                         "questions_answers": "x"}, WHY, "good", ""),
    "Anthropic/hh-rlhf": ({"chosen": HH + " good", "rejected": HH + " bad"}, TURNS, "good", "bad"),
    "HuggingFaceH4/ultrafeedback_binarized": (ULTRA, WHY, "good", "bad"),
    "tatsu-lab/alpaca": (ALPACA, [("user", "why\n\nthis?")], "good", ""),
    "databricks/databricks-dolly-15k": (DOLLY, WHY, "good", ""),
}


@pytest.mark.parametrize("name", HUB)
def test_a_named_data_set(name):
    row, turns, chosen, rejected = PUBLISHED[name]
    form = HUB[name]
    assert set(form.needs) <= set(row)
    pair, = form.pairs(row)
    assert ([(role, text.strip()) for role, text in pair.turns], pair.chosen.strip(), pair.rejected.strip()) == (
        turns, chosen, rejected)


def test_margins_are_kept():
    assert next(iter(HUB["openai/webgpt_comparisons"].pairs(WEBGPT))).margin == 1.0
    assert next(iter(HUB["stanfordnlp/SHP"].pairs(SHP))).margin == 7.0
    assert next(iter(FORMATS["preference"].pairs(ULTRA))).margin == 1.5
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for margin, kept in (({}, None), ({"margin": ""}, None), ({"margin": "0.5"}, 0.5)):
        assert next(iter(FORMATS["preference"].pairs(row | margin))).margin == kept


def test_what_is_no_preference_is_an_answer_to_learn_from():
    """A tie, and a query that has no negative passage: kept for SFT and PPO, as DeepSpeed-Chat's SFT keeps them."""
    tie, = HUB["openai/webgpt_comparisons"].pairs(WEBGPT | {"score_0": 0.0, "score_1": 0.0})
    alone, = HUB["Cohere/miracl-ja-queries-22-12"].pairs(MIRACL | {"negative_passages": []})
    assert (tie.chosen, tie.rejected, alone.chosen, alone.rejected) == ("bad", "", "good", "")


def reply(text, rank, *replies, role="assistant"):
    return {"message_id": text, "text": text, "role": role, "rank": rank, "replies": list(replies), "lang": "en"}


def test_a_ranked_tree_gives_all_pairs_at_every_place():
    again = reply("and?", None, reply("deep good", 0), reply("deep bad", 1), role="prompter")
    row = {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": reply(
        "why?", None, reply("worst", 2), reply("best", 0, again), reply("middle", 1), reply("unranked", None),
        role="prompter")}
    pairs = [(p.turns[-1][1], p.chosen, p.rejected, p.margin) for p in FORMATS[guess(row)[0]].pairs(row)]
    assert pairs == [("why?", "best", "middle", 1.0), ("why?", "best", "worst", 2.0), ("why?", "middle", "worst", 1.0),
                     ("and?", "deep good", "deep bad", 1.0)]


def test_a_tree_without_a_pair_gives_its_answer():
    tree = FORMATS["tree"].pairs({"prompt": reply("why?", None, reply("so", None), role="prompter")})
    assert [(p.chosen, p.rejected) for p in tree] == [("so", "")]


@pytest.mark.parametrize("row, form, turns, chosen", [
    ({"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "why?"},
                        {"from": "gpt", "value": "good"}], "id": "1"}, "sharegpt", [("system", "be kind"), *WHY],
     "good"),
    ({"messages": chat("hi", "hello", "why?", "good")}, "messages", TURNS, "good"),
    ({"prompt": "why?", "response": "good"}, "response", WHY, "good"),
    ({"prompt": HH, "response": "good"}, "response", TURNS, "good"),
    ({"text": "once upon a time"}, "text", [], "once upon a time"),
])
def test_a_generic_row(row, form, turns, chosen):
    assert guess(row)[0] == form
    pair, = FORMATS[form].pairs(row)
    assert (pair.turns, pair.chosen, pair.rejected) == (turns, chosen, "")


@pytest.mark.parametrize("row, form", [({**ULTRA}, "preference"), (ALPACA, "alpaca"), (DOLLY, "dolly"), (SHP, "shp"),
                                       (WEBGPT, "webgpt"), (MIRACL, "miracl")])
def test_a_format_is_known_by_its_columns(row, form):
    assert guess(row)[0] == form


def test_other_common_names_are_guessed_and_nothing_else():
    assert guess(["question", "answer"]) == ("response", ["question", "answer"])
    assert guess(["question", "preferred", "worse"]) == ("preference", ["question", "preferred", "worse"])
    assert guess(["a", "b"]) is None


@pytest.mark.parametrize("form, row, reason", [
    ("preference", ULTRA | {"rejected": chat("how?", "bad")}, "answer different prompts"),
    ("preference", ULTRA | {"chosen": chat("why?")}, "does not end with an answer"),
    ("transcripts", {"chosen": HH + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "answer different prompts"),
    ("transcripts", {"chosen": "no roles", "rejected": HH + " b"}, "does not end with an answer"),
    ("messages", {"messages": "text"}, "no list of messages"), ("messages", {"messages": []}, "without a known role"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "without a known role"),
    ("tree", {"message_tree_id": "t", "prompt": {"text": "x"}}, "no tree of messages"),
    ("tree", {"prompt": reply("why?", None, role="prompter")}, "a tree without an answer"),
    ("tree", {"prompt": reply("why?", None, reply(" ", 0), role="prompter")}, "'text' is no text"),
    ("miracl", MIRACL | {"positive_passages": []}, "'positive_passages.text' is no text"),
    ("webgpt", WEBGPT | {"answer_0": "[1]"}, "'answer_0' is no text"),
    ("yitingxie/rlhf-reward-datasets", {"prompt": "a", "chosen": "b", "rejected": "Assistant: "}, "'rejected' is no"),
    ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "a", "label": "</s>"}, "'label' is no text"),
    ("response", {"prompt": "why?", "response": 3}, "'response' is no text"),
])
def test_a_row_that_does_not_fit_says_why(form, row, reason):
    with pytest.raises(BadRow) as caught:
        list((FORMATS | HUB)[form].pairs(row))
    assert reason in caught.value.reason
