"""What one row of a data set says: a table of formats, and of the Hub's data sets that have them.

A format names the columns it needs and turns a row into pairs. A row that cannot be used raises BadRow.
"""

import itertools
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dschat_kit.data.prompts import ASSISTANT, HUMAN, Turn, split_dialogue, turns_of


class BadRow(ValueError):
    """A row that cannot be used: `reason` is counted, `detail` is shown for the first one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason = reason


class Pair(NamedTuple):
    """A dialogue and what came next."""
    turns: list[Turn]  # empty for plain text
    chosen: str
    rejected: str = ""  # empty where a row has one response only
    margin: float | None = None  # by how much the chosen one is better, in the units of the source


@dataclass(frozen=True)
class Format:
    needs: tuple[str, ...]
    pairs: Callable[[dict], Iterable[Pair]]
    hub: dict[str, str] = field(default_factory=dict)
    """How the Hub has it: path, data_dir, splits (those that are read)."""


def _text(row: dict, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name!r} is no text", f"{name!r} is {reprlib.repr(value)}\n  expected: text that is not empty")
    return value


def _messages(row: dict, name: str) -> list[Turn]:
    """Turns of [{role, content}] or, as ShareGPT has them, [{from, value}]."""
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
    try:
        turns = [(m["role"], m["content"]) if "role" in m else (m["from"], m["value"]) for m in row[name]]
    except (TypeError, KeyError):
        raise BadRow(f"{name!r} is no list of messages") from None
    turns = [(roles.get(role, role), text) for role, text in turns]
    if not turns or not all(role in ("system", "user", "assistant") and isinstance(text, str) for role, text in turns):
        raise BadRow(f"{name!r} has a message without a known role and text")
    return turns


def _answered(turns: list[Turn], name: str) -> tuple[list[Turn], str]:
    if len(turns) < 2 or turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise BadRow(f"{name!r} does not end with an answer")
    return turns[:-1], turns[-1][1]


def _chat(column: str) -> Format:
    return Format((column,), lambda row: [Pair(*_answered(_messages(row, column), column))])


def _asked(row: dict) -> list[Turn]:
    return turns_of(_text(row, "prompt"))


def _margin(row: dict) -> float | None:
    high, low, margin = (row.get(name) for name in ("score_chosen", "score_rejected", "margin"))
    if high is None or low is None:
        return None if margin in (None, "") else float(margin)  # an empty cell of a CSV is ""
    return float(high) - float(low)


def _preference(row: dict) -> Iterable[Pair]:
    if isinstance(row["chosen"], list):  # UltraFeedback, binarised: both sides repeat the question
        return _same_prompt(row, _messages)
    return [Pair(_asked(row), _text(row, "chosen"), _text(row, "rejected"), _margin(row))]


def _same_prompt(row: dict, dialogue: Callable[[dict, str], list[Turn]]) -> Iterable[Pair]:
    (turns, chosen), (other, rejected) = (_answered(dialogue(row, side), side) for side in ("chosen", "rejected"))
    if turns != other:
        raise BadRow("chosen and rejected answer different prompts")
    return [Pair(turns, chosen, rejected, _margin(row))]


def _tree(row: dict) -> Iterable[Pair]:
    """All pairs of ranked answers at every place of a tree of messages, rank 0 being the best (OpenAssistant). Where
    there is no such pair, the best or only answer."""
    def walk(message: dict, before: list[Turn]) -> Iterable[Pair]:
        """Pairs of the answers to `message`, which follows the turns `before`, and of all that comes below it."""
        role = {"prompter": "user"}.get(message["role"], message["role"])
        turns, replies = [*before, (role, _text(message, "text"))], message.get("replies") or []
        answers = [reply for reply in replies if reply["role"] == "assistant"]
        ranked = sorted((a for a in answers if a.get("rank") is not None), key=lambda answer: answer["rank"])
        pairs = [Pair(turns, _text(better, "text"), _text(worse, "text"), float(worse["rank"] - better["rank"]))
                 for better, worse in itertools.combinations(ranked, 2) if better["rank"] < worse["rank"]]
        yield from pairs or [Pair(turns, _text(answer, "text")) for answer in (ranked or answers)[:1]]
        for reply in replies:
            yield from walk(reply, turns)
    try:
        pairs = list(walk(row["prompt"], []))
    except (TypeError, KeyError, AttributeError):
        raise BadRow("'prompt' is no tree of messages with text, role and replies") from None
    if not pairs:
        raise BadRow("a tree without an answer")
    return pairs


def _webgpt(row: dict) -> Iterable[Pair]:
    """Citations such as [1] are cut out. A score of 0 is a tie: an answer to learn from, and no preference."""
    clean = {name: re.sub(r" ?[\(\[].*?[\)\]]", "", _text(row, name)) for name in ("answer_0", "answer_1")}
    answers = [_text(clean, name) for name in clean]
    gap = float(row["score_0"]) - float(row["score_1"])
    chosen, rejected = answers if gap >= 0 else answers[::-1]
    return [Pair([("user", _text(row["question"], "full_text"))], chosen, rejected if gap else "", abs(gap))]


def _shp(row: dict) -> Iterable[Pair]:
    answers = [_text(row, name) for name in ("human_ref_A", "human_ref_B")]
    scores = [row.get(name) for name in ("score_A", "score_B")]
    return [Pair([("user", _text(row, "history"))], *(answers if int(row["labels"]) == 1 else answers[::-1]),
                 None if None in scores else abs(float(scores[0]) - float(scores[1])))]


def _yitingxie(row: dict) -> Iterable[Pair]:
    clean = {side: _text(row, side).strip().removeprefix("Assistant:") for side in ("chosen", "rejected")}
    return [Pair(_asked(row), *(_text(clean, side) for side in clean))]


def _vicuna(row: dict) -> Iterable[Pair]:
    """USER: and ASSISTANT:, whose answers end with </s>."""
    text = re.sub(r"\s+ASSISTANT:", ASSISTANT, re.sub(r"(^|</s>|\s)\s*USER:", HUMAN, _text(row, "prompt")))
    turns = split_dialogue(text.replace("</s>", ""))
    answer = _text({"label": _text(row, "label").removesuffix("</s>")}, "label")
    return [Pair(turns if HUMAN in text else [("user", text)], answer)]


def _instruction(row: dict) -> Iterable[Pair]:
    more = row.get("input") or row.get("context") or ""
    question = _text(row, "instruction") + (f"\n\n{more}" if more.strip() else "")
    return [Pair([("user", question)], _text(row, "output" if "output" in row else "response"))]


def _plain(prompt: str, chosen: str, rejected: str = "") -> Format:
    """Columns that hold one question and one text each; `a.b` is b inside of a, and of a list the first is taken.

    A row whose list of rejected texts is empty has one response.
    """
    def text(row: dict, path: str) -> str:
        """What stands at `path`. Raises BadRow."""
        found = row
        for name in path.split("."):
            found = found if found == [] else found[name]
            found = found[0] if isinstance(found, list) and found else found
        return "" if path == rejected and found == [] else _text({path: found}, path)
    needs = tuple(path.partition(".")[0] for path in (prompt, chosen, rejected) if path)
    return Format(needs, lambda row: [Pair([("user", text(row, prompt))], text(row, chosen),
                                           text(row, rejected) if rejected else "")])


FORMATS: dict[str, Format] = {
    "preference": Format(("prompt", "chosen", "rejected"), _preference),
    "transcripts": Format(("chosen", "rejected"),
                          lambda row: _same_prompt(row, lambda row, side: split_dialogue(_text(row, side)))),
    "tree": Format(("message_tree_id", "prompt"), _tree),
    "messages": _chat("messages"),
    "sharegpt": _chat("conversations"),
    "alpaca": Format(("instruction", "output"), _instruction),
    "dolly": Format(("instruction", "response"), _instruction),
    "response": Format(("prompt", "response"), lambda row: [Pair(_asked(row), _text(row, "response"))]),
    "webgpt": Format(("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
    "shp": Format(("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    "miracl": _plain("query", "positive_passages.text", "negative_passages.text"),
    "text": Format(("text",), lambda row: [Pair([], _text(row, "text"))]),
}
"""In the order in which they are tried on a file whose format nobody has named."""

HUB: dict[str, Format] = {
    "Dahoas/rm-static": FORMATS["preference"],
    "Dahoas/full-hh-rlhf": FORMATS["preference"],
    "Dahoas/synthetic-instruct-gptj-pairwise": _plain("prompt", "chosen", "rejected"),
    "yitingxie/rlhf-reward-datasets": Format(("prompt", "chosen", "rejected"), _yitingxie),
    "openai/webgpt_comparisons": FORMATS["webgpt"],
    "stanfordnlp/SHP": FORMATS["shp"],
    "pvduy/sharegpt_alpaca_oa_vicuna_format": Format(("prompt", "label"), _vicuna),
    "wangrui6/Zhihu-KOL": _plain("INSTRUCTION", "RESPONSE"),
    "Cohere/miracl-zh-queries-22-12": replace(FORMATS["miracl"], hub={"splits": "train,dev"}),
    "Cohere/miracl-ja-queries-22-12": replace(FORMATS["miracl"], hub={"splits": "train,dev"}),
    "Hello-SimpleAI/HC3-Chinese": replace(_plain("question", "human_answers"), hub={"data_dir": "all"}),
    "mkqa-Chinese": replace(_plain("queries.zh_cn", "answers.zh_cn.text"), hub={"path": "apple/mkqa"}),
    "mkqa-Japanese": replace(_plain("queries.ja", "answers.ja.text"), hub={"path": "apple/mkqa"}),
    "lmqg/qg_jaquad": _plain("question", "sentence"),
    "lmqg/qag_jaquad": _plain("questions", "paragraph"),
    "Anthropic/hh-rlhf": FORMATS["transcripts"],
    "HuggingFaceH4/ultrafeedback_binarized": replace(FORMATS["preference"],
                                                     hub={"splits": "train_prefs,test_prefs"}),
    "tatsu-lab/alpaca": FORMATS["alpaca"],
    "databricks/databricks-dolly-15k": FORMATS["dolly"],
}
"""Data sets whose columns are known by name; any other one is guessed at as a file is."""

SYNONYMS = {"prompt": ("question", "query", "instruction", "input"), "chosen": ("preferred", "accepted", "better"),
            "rejected": ("dispreferred", "worse"), "response": ("answer", "completion", "output", "target")}


def guess(columns: Iterable[str]) -> tuple[str, list[str]] | None:
    """(the first format whose columns are all there, the file's names for them); other common names are tried when no
    format fits the names as they are."""
    present = set(columns)
    for synonyms in ({}, SYNONYMS):
        for name, form in FORMATS.items():
            found = [next((s for s in (need, *synonyms.get(need, ())) if s in present), "") for need in form.needs]
            if all(found):
                return name, found
    return None
