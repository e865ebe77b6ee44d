"""The settings of the data stage: a section of the configuration with texts to be parsed, hence a file of its own."""

import re
from dataclasses import dataclass

from dschat_kit.sections import Section, bounded, error, finite


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    sources: str = "toy"
    """`toy`, or PATH[:weight][,PATH[:weight]...] where PATH is a file (.jsonl .json .csv .parquet .arrow .txt, also
    compressed), a folder or a glob of such, a folder of save_to_disk, a data set of the Hugging Face Hub, or a source
    that data.module registers. Files that begin with eval, test or valid beside others are held out. A comma inside
    a path is written \\,"""
    columns: str = ""
    """Names of the columns: prompt,chosen,rejected or prompt,response or text; empty guesses and shows them."""
    module: str = ""
    """A .py file or importable module of yours that calls `register_source`; every rank imports it."""
    bad_rows: str = bounded("stop", one_of=("stop", "skip"))
    """A row that cannot be used: stop, or skip it and report how many and why."""
    prompt_style: str = bounded("dialogue", one_of=("dialogue", "chat"))
    """dialogue is Human/Assistant text, chat the chat template of the model's tokenizer."""
    system: str = ""
    """A system message for every dialogue that has none."""
    rows: int = bounded(0, least=0)
    """At most so many training rows are taken from each source (toy: generated); 0 takes every row that there is."""
    stage_split: str = "2,4,4"
    """Shares of the training rows that go to sft, reward and ppo; a prompt is in one of them only."""
    eval_fraction: float = bounded(0.08, above=0, below=1)
    """Share of the prompts held out from all three trainings (sources without an own eval part)."""
    eval_rows: int = bounded(512, least=1)
    """At most so many held-out rows are evaluated on."""
    max_prompt_tokens: int = bounded(256, least=1)
    """A longer prompt keeps its end."""
    max_response_tokens: int = bounded(256, least=1)
    """A longer response keeps its start (and loses its EOS)."""
    drop_longer: bool = False
    """Leave out rows that these two limits would cut."""
    drop_duplicates: bool = False
    """Leave out rows of the same prompt and responses as an earlier one."""
    min_response_tokens: int = bounded(0, least=0)
    """Leave out rows with a shorter response."""
    min_margin: float = bounded(0.0, least=0)
    """Leave out pairs whose chosen response is better by less, in the units of the source."""
    balance_length: bool = False
    """Leave out reward rows until the chosen response is as often the longer as the shorter one."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.column_names()) > 3 or not all(self.column_names()):
            raise error("data.columns", repr(self.columns), "three names: prompt, chosen and rejected; or two: prompt "
                        "and response; or one: text", "--set data.columns=prompt,chosen,rejected")
        self.split_shares(), self.weighted_sources()

    def column_names(self) -> tuple[str, ...]:
        """The names in `columns`; none where they are to be guessed."""
        return tuple(name.strip() for name in self.columns.split(",")) if self.columns.strip() else ()

    def split_shares(self) -> tuple[float, float, float]:
        """Shares of sft, reward and ppo, summing to 1."""
        shares = [finite(part) for part in self.stage_split.split(",")]
        if len(shares) != 3 or not all(share and share > 0 for share in shares):
            raise error("data.stage_split", repr(self.stage_split), "three positive numbers: sft,reward,ppo",
                         "--set data.stage_split=2,4,4")
        return tuple(share / sum(shares) for share in shares)

    def weighted_sources(self) -> list[tuple[str, float | None]]:
        """(path or name, weight or None) of each source. A colon that no number follows belongs to the path."""
        pairs = []
        for part in filter(None, (part.strip() for part in re.split(r"(?<!\\),", self.sources))):
            part = part.replace("\\,", ",")
            name, _, weight = part.rpartition(":")
            pairs.append((name, finite(weight)) if name and finite(weight) is not None else (part, None))
        names = [name for name, _ in pairs]
        if not pairs or len(set(names)) < len(names) or any(weight is not None and weight <= 0 for _, weight in pairs):
            raise error("data.sources", repr(self.sources),
                         "PATH[:weight][,PATH[:weight]...], each source once, weights above 0",
                         "--set data.sources=my.jsonl:2,other.jsonl:1")
        return pairs
