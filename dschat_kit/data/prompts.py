"""A record's texts -> the exact text that a model reads. The only file that spells the dialogue's roles."""

__all__ = ["ASSISTANT", "HUMAN", "prompt_text", "question_of", "response_text"]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def prompt_text(text: str) -> str:
    """A question or a whole dialogue, ending where the assistant speaks next.

    A text without roles becomes one human turn; a dialogue keeps its turns. DeepSpeed-Chat's form.
    """
    if HUMAN in text:
        return text.rstrip() if text.rstrip().endswith(ASSISTANT) else text.rstrip() + ASSISTANT
    return f"{HUMAN} {text.strip()}{ASSISTANT}"


def response_text(text: str) -> str:
    """A response as it follows `Assistant:`: one space, then the text."""
    return " " + text.strip()


def question_of(prompt: str) -> str:
    """What the human said last, for display."""
    return prompt.rpartition(HUMAN)[2].removesuffix(ASSISTANT).strip()
