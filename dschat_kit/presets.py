"""Named pipelines. A preset is data: `--set section.field=value` changes any of it."""

from dschat_kit.config import (
    Checkpoint,
    ConfigError,
    Data,
    Lora,
    Model,
    Pipeline,
    Ppo,
    Reward,
    Rollout,
    Sampling,
    Sft,
    Zero,
)

__all__ = ["PRESETS", "get_preset"]

PRESETS: dict[str, Pipeline] = {
    # The embedded dialogue world and a model from random weights: minutes on two CPU cores.
    "tiny": Pipeline(
        data=Data(sources="toy", rows=52_000, stage_split="3,5,2", max_prompt_tokens=64, max_response_tokens=64,
                  eval_rows=2048),
        model=Model(name="scratch", vocab_size=600), zero=Zero(stage=2), sampling=Sampling(max_new_tokens=48),
        sft=Sft(max_steps=800, batch_size=20, micro_batch_size=10, lr=2.5e-3, eval_every=100),
        reward=Reward(max_steps=600, batch_size=16, micro_batch_size=8, lr=1e-3, scale=True, eval_every=100),
        ppo=Ppo(max_steps=24, rollout_batch_size=128, mini_batch_size=32, micro_batch_size=16, missing_eos_score=-1.0,
                eval_prompts=612),
        checkpoint=Checkpoint(every_steps=100)),
    # Real human preferences and a small instruction model, cut to what two CPU cores do within 45 minutes.
    "smollm2-hh": Pipeline(
        data=Data(sources="hh-helpful", stage_split="2,4,4", max_prompt_tokens=96, max_response_tokens=64,
                  eval_rows=512),
        model=Model(name="HuggingFaceTB/SmolLM2-135M-Instruct"), zero=Zero(stage=2),
        sampling=Sampling(max_new_tokens=48),
        lora=Lora(rank=16),
        sft=Sft(max_steps=60, batch_size=8, micro_batch_size=2, lr=2e-4, eval_every=30, eval_rows=64),
        reward=Reward(epochs=2, max_steps=150, batch_size=4, micro_batch_size=1, lr=2e-4, eval_every=50, eval_rows=32),
        ppo=Ppo(max_steps=12, rollout_batch_size=16, mini_batch_size=8, micro_batch_size=4, lr_actor=1e-4,
                lr_critic=2e-4, kl_coef=0.05, eval_prompts=32),
        rollout=Rollout(micro_batch_size=8)),
}


def get_preset(name: str) -> Pipeline:
    """The pipeline of that name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"--preset: got {name!r}\n  expected: one of {', '.join(PRESETS)}\n  change:   the name")
    return PRESETS[name]
