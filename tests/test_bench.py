"""`dschat bench`: the work is the same for all, what is counted is what is useful, and bad input is said."""

import argparse
import json

import pytest
import torch
from test_decode import run
from tiny_models import causal_lm, folder

from dschat_kit import bench
from dschat_kit.cli import main
from dschat_kit.config import ConfigError
from dschat_kit.train.bench import Work, load_model, peak_anon_mb
from dschat_kit.train.telemetry import weights_of

SPEC = {"batch": 6, "prompt_tokens": 9, "new_tokens": 7, "temperature": 1.0, "seed": 0}
TINY = ["--model", "random:tiny", "--batch", "3", "--prompt-tokens", "5", "--new-tokens", "4", "--dtype", "fp32",
        "--repeats", "1", "--json"]


def work(**changes):
    return Work(SPEC | changes, load_model("random:tiny", "fp32").config, 0, torch.device("cpu"))


def test_rows_end_where_the_drawn_lengths_say_for_every_engine():
    job, model = work(response_lengths=[2, 5, 30]), load_model("random:tiny", "fp32")
    assert set(job.lengths.tolist()) <= {2, 5, 7} and len(set(job.lengths.tolist())) > 1
    request, sampling = job.kit()
    ours = run(model, request, sampling)
    assert torch.equal(ours.response_mask.sum(1), job.lengths)
    theirs = job.generate(model, False)[:, job.prompts.shape[1]:]
    for row, length in zip(theirs, job.lengths.tolist(), strict=True):
        assert row[length - 1] == job.eos and not (row[:length - 1] == job.eos).any()
        assert (row[length:] == job.pad).all()
    assert theirs.shape[1] == job.lengths.max()


def test_prompts_are_those_of_the_file_cut_from_the_left():
    job = work(prompt_ids=[[5, 6, 7], list(range(2, 40))])
    for ids, mask in zip(job.prompts, job.mask, strict=True):
        assert ids[mask].tolist() in ([5, 6, 7], list(range(31, 40)))


def test_the_cost_is_that_of_the_shapes():
    """Counted by hand for one row: every fed token meets every layer matrix, every sampled one the head."""
    model = load_model("random:tiny", "fp32")
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert weights_of(model) == (weights, 64 * 1000, 2 * 64)
    flops, read = work(batch=1).cost(model)
    fed = 9 + 7 - 1
    assert flops == 2 * weights * fed + 2 * 64 * 1000 * 7 + sum(4 * 2 * 64 * context for context in range(1, fed + 1))
    assert read == (weights + 64 * 1000) * 7 + sum(2 * 2 * 64 * context for context in range(10, fed + 1))


def test_peak_memory_counts_what_a_call_holds():
    assert 150 < peak_anon_mb(lambda: torch.ones(50_000_000).sum()) < 300


@pytest.mark.parametrize("flags, words", [
    (["--engines", "kit,vllm"], "expected: some of kit,hf,hf_default,deepspeed"),
    (["--batch", "0"], "--batch: got 0"), (["--ranks", "9999"], "change:   --ranks"),
    (["--prompts", "missing.jsonl"], "missing.jsonl"),
    (["--live-parameters", "0"], "--live-parameters: got 0 with rollout --zero 0"),
])
def test_bad_flags_are_said(flags, words, capsys, tmp_path):
    model = ["--model", str(folder(tmp_path))] if "--prompts" in flags else []
    assert main(["bench", "rollout", *model, *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [(["--engines", "hf_default"], "expected: kit or hf"),
                                          (["--zero", "3", "--live-parameters", "0"], "it for `bench rollout`")])
def test_what_an_iteration_has_no_peer_or_no_meaning_for_is_said(flags, words, capsys):
    assert main(["bench", "ppo", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_shape_that_is_none_and_rows_beyond_the_positions_are_said():
    with pytest.raises(ConfigError, match="got random:opt-126m\n  expected: .*opt-125m, llama"):
        load_model("random:opt-126m", "fp32")
    with pytest.raises(ConfigError, match="got 9 [+] 2100\n  expected: at most 2048 together"):
        work(new_tokens=2100)


def test_what_a_rank_says_to_users_is_said_without_its_traceback():
    said = bench._reason(1, "[rank0]: Traceback (most recent call last):\n[rank0]:   File \"x.py\", line 1\n"
                         "[rank0]: dschat_kit.config.ConfigError: /nope: no model\n[rank0]:   expected: a folder\n"
                         "[rank0]:   change:   the name\n[2026-11-30 06:00:00] [INFO] killing\n")
    assert said == "/nope: no model\n  expected: a folder\n  change:   the name"
    other = bench._reason(7, "\n".join(map(str, range(2000))))
    assert other.startswith("the measurement ended with exit code 7\n") and other.endswith("1998\n1999")


def test_a_reader_gets_a_table():
    row = {"tokens_per_second": 20.0, "seconds": 1.0, "peak_anon_mb": 5.0}
    said = bench.table({"engines": {"kit": row, "hf": {**row, "tokens_per_second": 10.0}, "hf_default": None},
                        "ratio_to_hf": 2.0, "ratio_to_hf_default": None, "roofline": {"share_of_matrix_peak": 0.5},
                        "path": "slots", "reason": "so", "identical_greedy_tokens": False}).splitlines()
    assert said[1].split() == ["kit", "20.0", "1.00", "5"] and said[2].split() == ["hf", "10.0", "1.00", "5", "2.00"]
    assert said[3:] == ["kit: 50% of the matrix peak, path slots (so)",
                        "greedy tokens in fp32: OTHERS than plain transformers'"]


def test_a_penalty_in_the_models_folder_is_nobodys(tmp_path):
    model = causal_lm()
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "fp32").generation_config.repetition_penalty in (None, 1.0)


def test_texts_need_no_fetched_tokenizer(tmp_path, monkeypatch):
    rows = [{"prompt": "the cow\u2028says " * n, "chosen": "moo " * n} for n in (1, 2, 30)]  # a line break of Unicode's
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    monkeypatch.setattr(bench, "checkout", lambda: tmp_path)
    file = tmp_path / "rows.jsonl"
    args = argparse.Namespace(model="random:tiny", prompts=file, lengths=str(file))
    found = bench._texts(args)
    assert found["tokenizer"] == "trained on FILE" and len(found["prompt_ids"]) == 3
    assert found["response_lengths"][0] < found["response_lengths"][1] < found["response_lengths"][2]
    folder(tmp_path / "models" / "some")
    assert bench._texts(args)["tokenizer"] == "some"


@pytest.mark.slow
def test_every_engine_is_measured_on_the_same_work(tmp_path, capsys):
    rows = [{"prompt": "the cow says " * n, "chosen": "moo " * n} for n in (1, 2, 3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model = str(folder(tmp_path / "model", "opt"))
    assert main(["bench", "rollout", *TINY, "--model", model, "--prompts", str(file), "--lengths", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["engines"]) == {"kit", "hf", "hf_default", "deepspeed"}
    assert all(set(row) >= {"tokens_per_second", "seconds", "peak_anon_mb"} for row in found["engines"].values())
    for name in ("hf", "hf_default", "deepspeed"):
        assert found[f"ratio_to_{name}"] == pytest.approx(
            found["engines"]["kit"]["tokens_per_second"] / found["engines"][name]["tokens_per_second"])
    assert found["identical_greedy_tokens"] is True
    assert set(found["roofline"]) == {"matrix_gflops", "read_gb_per_s", "share_of_matrix_peak", "share_of_bandwidth"}
    assert main(["bench", "ppo", *TINY, "--engines", "kit"]) == 0
    iteration = json.loads(capsys.readouterr().out)
    assert iteration["engines"]["hf"] is None and iteration["ratio_to_hf"] is None
    assert iteration["identical_greedy_tokens"] is True and set(iteration["roofline"]) == set(found["roofline"])
    phases = iteration["engines"]["kit"]["phases"]
    assert sum(phases.values()) == pytest.approx(iteration["engines"]["kit"]["seconds"], rel=0.01)
