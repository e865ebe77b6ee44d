"""An embedded dialogue world whose true ("gold") reward is known.

People ask one or two questions about a small world of facts. A writer of mixed quality answers: sometimes
courteous, sometimes rude, with or without filler, with the right value or with that fact's common mistake.
Preferences between two answers are drawn from the gold reward by Bradley-Terry. Gold labels the preferences
and measures the result; no training stage ever reads it.

Standard library only; rows come from one seeded stream, so a longer stream starts with the shorter one.
"""

import math
import random
from collections.abc import Iterable, Iterator

WEIGHTS = {"correct": 0.6, "polite": 0.2, "brief": 0.2}
PREFERENCE_SCALE = 12.0
GOLD_SENTENCE = ("Gold = 0.6 x the share of questions answered correctly + 0.2 if the answer is courteous exactly once "
                 "and never rude + 0.2 if no sentence is needless; text that is unfinished or not made of this world's "
                 "sentences gets 0.")

# attribute -> (question, statement, {subject: (right value, common mistake)})
ATTRIBUTES: dict[str, tuple[str, str, dict[str, tuple[str, str]]]] = {
    "sound": ("what does a {} say", "A {} says {}.", {
        "cow": ("moo", "baa"), "dog": ("woof", "tweet"), "cat": ("meow", "roar"),
        "duck": ("quack", "hiss"), "pig": ("oink", "buzz"), "horse": ("neigh", "cluck")}),
    "food": ("what does a {} eat", "A {} eats {}.", {
        "cow": ("grass", "beef"), "dog": ("bones", "soap"), "cat": ("fish", "leaves"),
        "duck": ("snails", "wood"), "pig": ("turnips", "stones"), "horse": ("hay", "cheese")}),
    "colour": ("what colour is a {}", "A {} is {}.", {
        "lemon": ("yellow", "pink"), "tomato": ("red", "blue"), "lime": ("green", "grey"),
        "carrot": ("orange", "white"), "plum": ("purple", "silver"), "coconut": ("brown", "black")}),
    "capital": ("what is the capital of {}", "The capital of {} is {}.", {
        "France": ("Paris", "Lyon"), "Japan": ("Tokyo", "Osaka"), "Egypt": ("Cairo", "Luxor"),
        "Kenya": ("Nairobi", "Mombasa"), "Peru": ("Lima", "Cusco"), "Italy": ("Rome", "Milan")}),
}
GREETINGS = ("Hello, ", "Please, ", "Hi, ")
COURTEOUS_OPENINGS = ("Good question.", "With pleasure.")
RUDE_OPENINGS = ("Go away.", "How silly.")
FILLERS = ("Let me think.", "Many people ask this.")
COURTEOUS_CLOSINGS = ("Best wishes.", "Thank you.")

SINGLE_QUESTION, OPENING_COURTEOUS, OPENING_RUDE, FILLER, CLOSING_COURTEOUS = 0.25, 0.35, 0.20, 0.4, 0.3
FACT_RIGHT = 0.55  # else the common mistake

_HEAD, _TAIL = "\n\nHuman: ", "?\n\nAssistant:"
Fact = tuple[str, str]  # (attribute, subject)


def all_facts() -> list[Fact]:
    """Every (attribute, subject) that can be asked, in a fixed order."""
    return [(attribute, subject) for attribute, (_, _, values) in ATTRIBUTES.items() for subject in values]


def question(fact: Fact) -> str:
    """The question form of a fact, lower case and without a question mark."""
    return ATTRIBUTES[fact[0]][0].format(fact[1])


def statement(fact: Fact, value: str | None = None) -> str:
    """The sentence that states `value` (the right one when None) for a fact."""
    _, form, values = ATTRIBUTES[fact[0]]
    return form.format(fact[1], values[fact[1]][0] if value is None else value)


QUESTIONS = {question(fact): fact for fact in all_facts()}
STATEMENTS = {statement(fact, value): (fact, statement(fact, value) == statement(fact)) for fact in all_facts()
              for pair in ATTRIBUTES[fact[0]][2].values() for value in pair}
"""Sentence -> (fact, is it right), for each value of each attribute."""
STYLE = {*COURTEOUS_OPENINGS, *RUDE_OPENINGS, *FILLERS, *COURTEOUS_CLOSINGS}


def make_prompt(facts: Iterable[Fact], greeting: str = GREETINGS[0]) -> str:
    """The prompt text that asks the given facts in this order."""
    return f"{_HEAD}{greeting}{' and '.join(question(fact) for fact in facts)}{_TAIL}"


def asked_facts(prompt: str) -> list[Fact]:
    """The facts a prompt (its last human turn) asks for; ValueError when it is not a prompt of this world."""
    start = prompt.rfind(_HEAD)
    body = prompt[start + len(_HEAD) :] if start >= 0 else ""
    greeting = next((text for text in GREETINGS if body.startswith(text)), None)
    if greeting is not None and body.endswith(_TAIL):
        facts = [QUESTIONS.get(part) for part in body[len(greeting) : -len(_TAIL)].split(" and ")]
        if None not in facts:
            return facts
    raise ValueError(f"got the prompt {prompt!r}; expected one of the toy world such as "
                     f"{make_prompt(all_facts()[:1])!r}; change the prompt, or do not ask for its gold reward")


def split_sentences(response: str) -> list[str] | None:
    """The response cut into sentences of this world; None when any part of it is not one."""
    *whole, last = response.strip(" ").split(". ")
    sentences = [*(part + "." for part in whole), last]
    return sentences if all(sentence in STATEMENTS or sentence in STYLE for sentence in sentences) else None


def gold_parts(prompt: str, response: str, finished: bool = True) -> dict[str, float]:
    """The parts of the gold reward, each in [0, 1]: correct, polite, brief, well_formed.

    `finished` says whether the response ended with EOS. A response that is unfinished or not made of this
    world's sentences has all parts 0. A question counts as answered correctly when its right value and no
    other is stated; needless are fillers, repetitions, and statements nobody asked for. ValueError: see
    `asked_facts`.
    """
    asked = asked_facts(prompt)
    sentences = split_sentences(response) if finished else None
    if sentences is None:
        return {"correct": 0.0, "polite": 0.0, "brief": 0.0, "well_formed": 0.0}
    stated: dict[Fact, list[bool]] = {}
    for sentence in sentences:
        if sentence in STATEMENTS:
            fact, right = STATEMENTS[sentence]
            stated.setdefault(fact, []).append(right)
    courtesies = sum(sentence in COURTEOUS_OPENINGS + COURTEOUS_CLOSINGS for sentence in sentences)
    rude = sum(sentence in RUDE_OPENINGS for sentence in sentences)
    needless = len(sentences) - courtesies - rude - sum(fact in stated for fact in asked)
    return {"correct": sum(fact in stated and all(stated[fact]) for fact in asked) / len(asked),
            "polite": float(courtesies == 1 and not rude), "brief": float(needless == 0), "well_formed": 1.0}


def gold_reward(prompt: str, response: str, finished: bool = True) -> float:
    """The true reward in [0, 1] of a response (see GOLD_SENTENCE); ValueError: see `asked_facts`."""
    parts = gold_parts(prompt, response, finished)
    return sum(weight * parts[name] for name, weight in WEIGHTS.items())


def preference_probability(gap: float) -> float:
    """P(first answer is preferred) under Bradley-Terry, for gap = gold(first) - gold(second)."""
    return 1.0 / (1.0 + math.exp(-PREFERENCE_SCALE * gap))


def bayes_accuracy(gold_gaps: Iterable[float]) -> float:
    """The best accuracy a reward model can have on pairs with these gold gaps; ValueError for no pairs."""
    values = [preference_probability(abs(float(gap))) for gap in gold_gaps]
    if not values:
        raise ValueError("got no gold gaps; expected at least one pair; change the size of the eval split")
    return sum(values) / len(values)


def write_answer(facts: Iterable[Fact], rng: random.Random) -> str:
    """One answer of the writer, who never looks at gold: a leading space, sentences, no EOS text."""
    sentences, draw = [], rng.random()
    if draw < OPENING_COURTEOUS + OPENING_RUDE:
        sentences.append(rng.choice(COURTEOUS_OPENINGS if draw < OPENING_COURTEOUS else RUDE_OPENINGS))
    if rng.random() < FILLER:
        sentences.append(rng.choice(FILLERS))
    for fact in facts:
        right, mistake = ATTRIBUTES[fact[0]][2][fact[1]]
        sentences.append(statement(fact, right if rng.random() < FACT_RIGHT else mistake))
    if rng.random() < CLOSING_COURTEOUS:
        sentences.append(rng.choice(COURTEOUS_CLOSINGS))
    return " " + " ".join(sentences)


def toy_rows(n: int, seed: int) -> Iterator[dict[str, str]]:
    """Stream n preference rows: prompt, chosen, rejected, split_key (the unordered set of questions).

    Deterministic in the seed, and the first rows do not depend on n.
    """
    facts, rng = all_facts(), random.Random(f"dschat-toy-{seed}")
    for _ in range(n):
        asked = rng.sample(facts, 1 if rng.random() < SINGLE_QUESTION else 2)
        prompt = make_prompt(asked, rng.choice(GREETINGS))
        first, second = write_answer(asked, rng), write_answer(asked, rng)
        gap = gold_reward(prompt, first) - gold_reward(prompt, second)
        if rng.random() >= preference_probability(gap):
            first, second = second, first
        key = " | ".join(sorted(question(fact) for fact in asked))
        yield {"prompt": prompt, "chosen": first, "rejected": second, "split_key": key}
