"""RLHF you can read, run and research: notebooks over real DeepSpeed jobs.

Read the modules in READING_ORDER; every one imports only from those before it.

    sections, data_section, model_section, config, presets    what was asked
    machine, feasible, runs, metrics                 the machine, what it cannot, and the run folder
    data/      raw rows -> records -> exact text -> splits -> token rows -> batches
    models/    Hugging Face models: causal, and with a scalar head
    rlhf/      the mathematics, plain torch
    engine/    DeepSpeed: engines, generation, checkpoints
    train/     the launched programs, one page a stage
    chat       talk to the result
    notebook/  what a kernel uses: files only, no torch
    verify     PPO against the exact optimum
    study      stage 3 over many seeds
    overopt    how far a reward model may be trusted
    cli        the command `dschat`
"""

READING_ORDER = (
    "sections", "data_section", "model_section", "config", "presets", "machine", "feasible", "runs", "metrics",
    "data.toy", "data.prompts", "data.formats", "data.files", "data.sources", "data.splits", "data.selection",
    "data.tokenizer", "data.store", "data.pipeline", "data.datasets", "data.benchmark",
    "models.attention", "models.packed", "models.loading", "models.saving", "models.scalar_model", "models.lora",
    "models.fetch",
    "rlhf.experience", "rlhf.rewards", "rlhf.losses", "rlhf.logprobs", "rlhf.rollout", "rlhf.worlds",
    "rlhf.overoptimisation",
    "engine.ds_config", "engine.engines", "engine.zero", "engine.ema", "engine.shared", "engine.rollout_types",
    "engine.loops", "engine.sampling", "engine.attention", "engine.decode", "engine.graphs",
    "engine.tensor_parallel", "engine.parity", "engine.streamed", "engine.replica", "engine.hybrid",
    "engine.checkpoints",
    "train.watch", "train.telemetry", "train.card", "train.session", "train.rank", "train.sft",
    "train.reward_report", "train.reward", "train.prompts", "train.roles", "train.ppo_metrics", "train.ppo",
    "train.dpo",
    "train.exact_models", "train.exact", "train.judge", "train.best_of_n", "train.bench", "train.bench_ppo",
    "chat", "bench",
    "notebook.processes", "notebook.report", "notebook.launch", "notebook.stage", "notebook.progress",
    "notebook.tables", "notebook.plots", "notebook.reward_plots", "notebook.monitor", "notebook.execute",
    "notebook.diagnosis", "notebook.doctor",
    "verify", "study", "overopt", "overopt_report", "cli",
)


def load(run_root, stage: str | None = None):
    """The trained model of a run, ready to talk: `dschat_kit.load("runs/tiny").ask("what does a cow say?")`."""
    from dschat_kit.chat import ChatSession
    return ChatSession.open(run_root, stage)
