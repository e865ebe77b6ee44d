"""A dialogue -> the exact text that a model reads. The only file that spells the roles or applies a chat template.

Two styles: `dialogue` is DeepSpeed-Chat's Human/Assistant text, `chat` the tokenizer's own template. Whichever it is,
the tokenizer of the run carries it as its `chat_template`, so that an exported model is prompted as it was trained.
"""

import json
import re
from collections.abc import Iterable

from dschat_kit.sections import error

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
Turn = tuple[str, str]
"""(role, text); the roles are system, user and assistant"""
MARKS = {"system": "", "user": HUMAN, "assistant": ASSISTANT}
DIALOGUE_TEMPLATE = (
    "{% for m in messages %}{% set said = m['content'] | trim %}"
    "{% if m['role'] == 'system' %}{{ said }}{% else %}"
    "{{ '\\n\\nHuman:' if m['role'] == 'user' else '\\n\\nAssistant:' }}{{ ' ' + said if said }}"
    "{{ eos_token if loop.last and m['role'] == 'assistant' and not add_generation_prompt }}{% endif %}{% endfor %}"
    "{{ '\\n\\nAssistant:' if add_generation_prompt }}")
WITH_SYSTEM = ("{%% if messages[0]['role'] != 'system' %%}"
               "{%% set messages = [{'role': 'system', 'content': %s}] + messages %%}{%% endif %%}")


def split_dialogue(text: str) -> list[Turn]:
    """The turns of a text in which roles are spelled out; what stands before the first one is the system message.

    A last turn of the assistant that is empty only says who speaks next and is left out.
    """
    parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    turns = [("system", parts[0].strip())] if parts[0].strip() else []
    turns += [("user" if mark == HUMAN else "assistant", said.strip())
              for mark, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if turns and turns[-1] == ("assistant", "") else turns


def dialogue_text(turns: Iterable[Turn]) -> str:
    """Human/Assistant text, ending where the assistant speaks next."""
    return "".join(MARKS[role] + (" " * (role != "system") + text.strip()).rstrip() for role, text in turns) + ASSISTANT


def turns_of(text: str) -> list[Turn]:
    """A question, or a whole dialogue in Human/Assistant text, which begins with its first `Human:`."""
    said = "\n\n" + text.strip()
    if not said.startswith(HUMAN):
        return [("user", text)]
    if ASSISTANT not in said and re.search(r"\sAssistant:$", said):  # on one line, as DeepSpeed-Chat's local files
        said = re.sub(r"\s+(Human|Assistant):", r"\n\n\1:", said)
    return split_dialogue(said)


def question_of(prompt: str) -> str:
    """What the human said last, for display."""
    return prompt.rpartition(HUMAN)[2].removesuffix(ASSISTANT).strip()


class PromptStyle:
    """How prompts and responses of one tokenizer are written. Nothing inside a turn can become a role or a special
    token: what would is broken by a space after its first character. Raises ConfigError for a template that cannot be
    trained on."""

    def __init__(self, tokenizer=None, style: str = "dialogue", system: str = "", specials: Iterable[str] = ()):
        self.tokenizer, self.chat, self.system = tokenizer, style == "chat", system
        specials = set(specials)
        if tokenizer is not None:
            specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            specials |= set(tokenizer.all_special_tokens)
        self.before, self.after, markers = " ", "", {HUMAN, ASSISTANT}
        if tokenizer is not None and (tokenizer.chat_template or not self.chat):
            tokenizer.chat_template = (WITH_SYSTEM % json.dumps(system) if system else "") + (
                tokenizer.chat_template if self.chat else DIALOGUE_TEMPLATE)
        if self.chat:
            markers = self._study_template(specials)
        self._markers = sorted(filter(str.strip, specials | markers), key=len, reverse=True)
        self.defused = 0

    @classmethod
    def of(cls, tokenizer) -> "PromptStyle":
        """The style of a model that was exported with its tokenizer; without a template Human/Assistant text."""
        return cls(tokenizer, "chat" if tokenizer.chat_template not in (None, "", DIALOGUE_TEMPLATE) else "dialogue")

    def prompt(self, turns: Iterable[Turn]) -> str:
        """The text before a response. Raises ValueError where the template refuses the turns."""
        turns = [(role, self.safe(text)) for role, text in turns]
        if self.chat:
            return self._render(turns, True) if turns else ""
        if self.system and turns and turns[0][0] != "system":
            turns = [("system", self.system), *turns]
        return dialogue_text(turns) if turns else ""

    def response(self, text: str) -> str:
        """A response without its EOS."""
        return self.before + self.safe(text.strip()) + self.after

    def safe(self, text: str) -> str:
        """The same text, in which nothing is a role's marker or a special token; `defused` counts what was."""
        for marker in self._markers:
            if marker in text:
                self.defused += text.count(marker)
                text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return text

    def _render(self, turns: list[Turn], ask: bool) -> str:
        from jinja2 import TemplateError
        try:
            return self.tokenizer.apply_chat_template([{"role": role, "content": text.strip()} for role, text in turns],
                                                      tokenize=False, add_generation_prompt=ask)
        except TemplateError as problem:
            raise ValueError(f"the chat template refuses it: {problem}") from problem

    def _study_template(self, specials: set[str]) -> set[str]:
        """Where an answer begins and ends in the template, and the words that are roles in it."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise error("data.prompt_style", "'chat', but the tokenizer has no chat template", "a model with one",
                        "--set data.prompt_style=dialogue, or another model.name")
        one, answer, two, last = said = ("QXAZQ", "QXBZQ", "QXCZQ", "QXDZQ")
        turns = [("user", one), ("assistant", answer), ("user", two)]
        try:
            asked, whole = self._render(turns, True), self._render([*turns, ("assistant", last)], False)
        except ValueError as problem:
            raise error("data.system", f"{self.system!r}, and {problem}", "roles that the template knows",
                        "--set data.system= or data.prompt_style=dialogue") from problem
        before, _, after = whole.removeprefix(asked).partition(last)
        if not whole.startswith(asked) or before.strip():
            asks, writes = asked.rpartition(two)[2], whole.rpartition(two)[2].partition(last)[0]
            raise error("data.prompt_style", f"a template that asks with {asks!r} and writes {writes!r} before answers",
                        "the same text, else a model is asked as it was never trained",
                        "the model's chat_template, or --set data.prompt_style=dialogue")
        found = re.search("|".join(map(re.escape, sorted(specials, key=len, reverse=True))), after)
        if found:  # what ends an answer here is what has to stop the generation
            self.tokenizer.eos_token = found[0]
        self.before, self.after = before, after[:found.start()] if found else ""
        pieces = re.split("|".join(map(re.escape, [*said, *specials])), whole)
        return {piece.strip() for piece in pieces if not piece.strip().isalnum()}
