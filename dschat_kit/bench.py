"""`dschat bench`: ours and the peers on the same work, in one run. What a rank does is in train/bench.py."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from dschat_kit.machine import checkout, detect
from dschat_kit.runs import RunError, read_json, write_json
from dschat_kit.sections import error

ENGINES = ("kit", "hf", "hf_default", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `dschat bench rollout` and `dschat bench ppo`."""
    option = parser.add_argument
    option("--model", default="random:opt-125m", metavar="NAME", help="a folder, a Hub name or random:opt-125m (also "
           "llama, bloom, gpt-neox, qwen3, tiny)")
    option("--ranks", type=int, default=1, metavar="N")
    option("--zero", type=int, default=0, choices=range(4))
    option("--batch", type=int, default=64, metavar="ROWS", help="rows of each rank")
    option("--prompt-tokens", type=int, default=64, metavar="N", help="with --prompts: at most so many")
    option("--new-tokens", type=int, default=64, metavar="N", help="with --lengths FILE: at most so many")
    option("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where hardware multiplies it")
    option("--temperature", type=float, default=1.0)
    option("--prompts", type=Path, metavar="FILE", help="JSON lines with `prompt` (default: random tokens)")
    option("--lengths", default="fixed", metavar="fixed|FILE", help="JSON lines with `chosen`: rows end as those do")
    option("--live-parameters", type=int, metavar="N", help="ZeRO-3: parameters kept gathered (DeepSpeed's default)")
    option("--engines", default=",".join(ENGINES), metavar="LIST")
    option("--repeats", type=int, default=5, metavar="N", help="timed rounds; the median counts")
    option("--json", action="store_true", help="one JSON object on standard output")


def run(args) -> int:
    """Measure, print, return 0."""
    engines = [name for name in args.engines.split(",") if name]
    if not engines or set(engines) - set(ENGINES):
        raise error("--engines", repr(args.engines), f"some of {','.join(ENGINES)}", "--engines kit,hf")
    engines = [name for name in engines if args.kind != "ppo" or name in ("kit", "hf")]
    if not engines:
        raise error("--engines", repr(args.engines), "kit or hf, whose iterations can be compared", "--engines kit,hf")
    if args.live_parameters is not None and (args.kind == "ppo" or args.zero < 3):
        raise error("--live-parameters", f"{args.live_parameters} with {args.kind} --zero {args.zero}",
                    "it for `bench rollout` at ZeRO-3", "--zero 3")
    for name, least in (("batch", 1), ("prompt_tokens", 1), ("new_tokens", 1), ("repeats", 1), ("temperature", 0)):
        if not (given := getattr(args, name)) >= least:
            flag = f"--{name.replace('_', '-')}"
            raise error(flag, str(given), f"at least {least}", f"{flag} {least or 1}")
    spec = {name: getattr(args, name) for name in ("model", "zero", "batch", "prompt_tokens", "new_tokens", "dtype",
                                                   "temperature", "live_parameters", "repeats")}
    machine = detect()
    machine.check_ranks(args.ranks, "--ranks")
    args.dtype = spec["dtype"] = machine.dtype if args.dtype == "auto" else args.dtype
    spec |= {"what": args.kind, "engines": engines, "seed": 0, **_texts(args)}
    print(f"bench {args.kind}: {', '.join(engines)} take turns, {args.repeats} rounds after a warm-up; a large model "
          "takes minutes", file=sys.stderr)
    result = _launch(spec, args.ranks)
    every = {name: result["engines"].get(name) for name in ENGINES}
    ours = every["kit"]
    ratios = {f"ratio_to_{name}": ours["tokens_per_second"] / every[name]["tokens_per_second"]
              if ours and every[name] else None for name in ENGINES[1:]}
    result = {**result, "engines": every, **ratios, "tokenizer": spec.get("tokenizer"),
              "command": {**vars(args), "command": None}, "load": os.getloadavg()[0]}
    print(json.dumps(result, default=str) if args.json else table(result))
    return 0


def table(result: dict) -> str:
    """The result for a reader; --json has all of it."""
    lines = [f"{'engine':<12}{'tokens/s':>10}{'seconds':>10}{'peak MB':>10}  kit is so many times as fast"]
    for name, row in result["engines"].items():
        if row:
            ratio = result.get(f"ratio_to_{name}")
            lines.append(f"{name:<12}{row['tokens_per_second']:>10.1f}{row['seconds']:>10.2f}{row['peak_anon_mb']:>10.0f}"
                         + (f"  {ratio:.2f}" if ratio else ""))
    if share := result["roofline"].get("share_of_matrix_peak"):
        lines.append(f"kit: {share:.0%} of the matrix peak, path {result['path']} ({result['reason']})")
    same = {True: "the same as", False: "OTHERS than", None: "not compared with"}[result["identical_greedy_tokens"]]
    return "\n".join([*lines, f"greedy tokens in fp32: {same} plain transformers'"])


def _texts(args) -> dict:
    """Token ids of the prompts and token counts of the responses in the named files. Random weights have no tokenizer:
    theirs is a fetched one, or without any one that is trained on these texts."""
    texts = {"prompt": [] if args.prompts is None else _rows(args.prompts, "prompt"),
             "chosen": [] if args.lengths == "fixed" else _rows(Path(args.lengths), "chosen")}
    if not any(texts.values()):
        return {}
    from dschat_kit.data.tokenizer import open_tokenizer, train_tokenizer
    fetched = next((path.parent for path in sorted((checkout() / "models").glob("*/tokenizer.json"))), None)
    if not args.model.startswith("random:"):
        tokenizer, name = open_tokenizer(args.model), args.model
    elif fetched:
        tokenizer, name = open_tokenizer(fetched), fetched.name
    else:
        tokenizer, name = train_tokenizer([text for some in texts.values() for text in some], 8192), "trained on FILE"
    ids = {column: tokenizer(some)["input_ids"] for column, some in texts.items() if some}
    found = {"prompt_ids": ids["prompt"]} if "prompt" in ids else {}
    if "chosen" in ids:
        found["response_lengths"] = [len(row) + 1 for row in ids["chosen"]]  # and EOS
    return found | {"tokenizer": name}


def _rows(path: Path, column: str) -> list[str]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as problem:
        raise error(str(path), f"no rows: {problem}", f"JSON lines with {column!r}", "the file") from problem
    if not rows or any(not isinstance(row, dict) or not row.get(column) for row in rows):
        raise error(str(path), f"a row without {column!r}", "JSON lines with it", "the file")
    return [row[column] for row in rows]


def _reason(code: int, said: str) -> str:
    """The last error for users among what ranks printed, without its traceback; where there is none, exit code and end
    of it all."""
    said = re.sub(r"^\[rank\d+\]:? ?", "", said, flags=re.MULTILINE)
    errors = re.findall(r"^dschat_kit\.\w+\.(?:ConfigError|RunError): (.*(?:\n  .*)*)", said, flags=re.MULTILINE)
    return errors[-1] if errors else f"the measurement ended with exit code {code}\n  {said[-3000:].strip()}"


def _launch(spec: dict, ranks: int) -> dict:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        path, port = Path(folder) / "spec.json", probe.getsockname()[1]
        write_json(path, spec)
        job = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port), "--module"]
        module = "dschat_kit.train.bench" + ("_ppo" if spec["what"] == "ppo" else "")
        command = [sys.executable, "-m", *(job if ranks > 1 else []), module, str(path)]
        probe.close()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.with_suffix(".result").exists():
            raise RunError(_reason(done.returncode, done.stdout + done.stderr))
        return read_json(path.with_suffix(".result"))
