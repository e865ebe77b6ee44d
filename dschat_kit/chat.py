"""Talk to an exported model: one answer, a stream, several at once, or two models side by side.

The one place where a notebook's kernel loads torch; it computes on the CPU unless told otherwise.
"""

import html
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from dschat_kit.data.prompts import PromptStyle, Turn, turns_of
from dschat_kit.data.tokenizer import open_tokenizer
from dschat_kit.metrics import JsonlWriter
from dschat_kit.models.loading import quiet_loading
from dschat_kit.runs import RunError, StageRun, open_run, write_json


class ChatSession:
    """A model folder and the dialogue so far. Temperature 0 answers with the likeliest tokens."""

    def __init__(self, model_dir: str | Path, *, device: str = "cpu", max_new_tokens: int = 128):
        from transformers import AutoModelForCausalLM
        if not (Path(model_dir) / "config.json").exists():
            raise RunError(f"{model_dir} holds no exported model\n  change: train it first, or name another run")
        self.tokenizer = open_tokenizer(model_dir)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token  # several questions are padded
        with quiet_loading():
            self.model = AutoModelForCausalLM.from_pretrained(str(model_dir)).to(device).eval()
        self.max_new_tokens, self.style = max_new_tokens, PromptStyle.of(self.tokenizer)
        self.history: list[Turn] = []

    @classmethod
    def open(cls, run_root: str | Path, stage: str | None = None, **options) -> "ChatSession":
        """The model of a run: that of `stage`, or of the last stage that has one (ppo, dpo, sft)."""
        runs = [open_run(Path(run_root), name) for name in ([stage] if stage else ["ppo", "dpo", "sft"])]
        for run in runs:
            if (run.model_dir / "config.json").exists():
                return cls(run.model_dir, **{"max_new_tokens": run.pipeline.sampling.max_new_tokens} | options)
        stages = " or ".join(run.stage for run in runs)
        raise RunError(f"{Path(run_root).absolute()} has no exported model of {stages}\n"
                       f"  change: `dschat {stage or 'run'} --run-root '{run_root}'`, or name another run")

    def ask(self, text: str, *, temperature: float = 0.0, seed: int = 0) -> str:
        """One answer, without the dialogue so far."""
        return self.ask_all([text], temperature=temperature, seed=seed)[0]

    @torch.no_grad()
    def ask_all(self, texts: list[str], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Answers to several questions in one batch, without the dialogue so far; one may be a whole dialogue."""
        inputs = self._inputs([self.style.prompt(turns_of(_asked(text))) for text in texts])
        answers = self._generate(inputs, temperature, seed)[:, inputs["input_ids"].shape[1]:]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def stream(self, text: str, *, temperature: float = 0.0, seed: int = 0, remember: bool = True) -> Iterator[str]:
        """The answer piece by piece, as it is generated, in the dialogue so far, which it joins with `remember`."""
        from transformers import TextIteratorStreamer
        inputs = self._inputs([self.style.prompt([*self.history, *turns_of(_asked(text))])])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work():
            try:
                self._generate(inputs, temperature, seed, streamer=streamer)
            except BaseException as error:  # noqa: BLE001  handed to the reader below, who would wait for ever otherwise
                failure.append(error)
                streamer.end()
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        thread.join()
        if failure:
            raise failure[0]
        if remember:
            self.history += [*turns_of(text), ("assistant", "".join(pieces).strip())]

    def _inputs(self, prompts: list[str]) -> dict:
        batch = self.tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left",
                               add_special_tokens=False)
        limit, width = getattr(self.model.config, "max_position_embeddings", None), batch["input_ids"].shape[1]
        if limit and width + self.max_new_tokens > limit:
            raise RunError(f"got {width} tokens of dialogue and {self.max_new_tokens} to answer\n"
                           f"  expected: at most {limit} together, the model's positions\n"
                           "  change:   a shorter question, or a new session")
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _generate(self, inputs: dict, temperature: float, seed: int, **more) -> torch.Tensor:
        how = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model.generate(**inputs, **how, **more, do_sample=temperature > 0,
                                       max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id)


def _asked(text: str) -> str:
    if not text.strip():
        raise RunError("got an empty question\n  expected: some text to answer\n  change:   ask something")
    return text


def compare(sessions: dict[str, ChatSession], questions: list[str], **how) -> list[dict]:
    """One row a question: {"question", name: answer, ...} for models side by side."""
    answers = zip(*(session.ask_all(questions, **how) for session in sessions.values()), strict=True)
    return [{"question": question, **dict(zip(sessions, row, strict=True))}
            for question, row in zip(questions, answers, strict=True)]


def record(run: StageRun, rows: list[dict]) -> None:
    """Keep a comparison in the run folder's chat stage: one line a question in samples.jsonl, and a finished status."""
    with run.lock():
        run.samples_path.unlink(missing_ok=True)
        writer = JsonlWriter(run.samples_path)
        for row in rows:
            writer.write(row)
        writer.close()
        write_json(run.path / "result.json", {"questions": len(rows), "config_hash": run.config["config_hash"],
                                              "seed": run.config["seed"], "world_size": 1, "resumed_from": [],
                                              "versions": {"torch": torch.__version__}})
        run.update_status(state="finished", step=len(rows), total=len(rows), error=None)


def box(session: ChatSession, example: str):
    """A text box whose answers appear as they are made; without a front end, one question and its answer."""
    if "DSCHAT_HEADLESS" in os.environ:
        print(f"> {example}\n{session.ask(example)}")
        return
    from IPython.display import display
    from ipywidgets import HTML, Text, VBox
    entry = Text(placeholder=f"{example}  (Enter asks)", continuous_update=False, layout={"width": "90%"})
    log = HTML()

    def answer(change):
        """Ask what was typed and show the answer piece by piece below what was said before."""
        question, before, said = change["new"].strip(), log.value, ""
        if not question:
            return
        entry.value = ""

        def write(text):
            log.value = f"{before}<p><b>{html.escape(question)}</b><br>" \
                        f'<span style="white-space:pre-wrap">{html.escape(text)}</span></p>'
        write("...")
        try:
            for piece in session.stream(question, remember=False):
                said += piece
                write(said.strip())
        except Exception as error:  # noqa: BLE001  a callback's error would go to a log that nobody reads
            write(f"error: {error}")
    entry.observe(answer, names="value")
    display(VBox([log, entry]))


def talk(run_root: Path, stage: str | None, questions: list[str] | None) -> int:
    """`dschat chat`: answer `questions` and leave, or a dialogue until an empty line or the end of input."""
    session = ChatSession.open(run_root, stage)
    for question in questions if questions is not None else _lines():
        for place, piece in enumerate(session.stream(question, remember=questions is None)):
            print(piece if place else piece.lstrip(), end="", flush=True)
        print(flush=True)
    return 0


def _lines() -> Iterator[str]:
    print("An empty line ends the talk.")
    with suppress(EOFError):
        yield from iter(lambda: input("you> ").strip(), "")
