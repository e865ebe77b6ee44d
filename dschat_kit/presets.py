"""Named pipelines. A preset is data: `--set section.field=value` changes any of it."""

import difflib

from dschat_kit.config import Checkpoint, Data, Dpo, Lora, Model, Pipeline, Ppo, Reward, Rollout, Sampling, Sft, Zero
from dschat_kit.sections import error


def _opt(actor: str, *, ranks: int, stage: int, lora: int, micro: int) -> Pipeline:
    """An OPT actor with the reward model and critic of 350M that DeepSpeed-Chat pairs with it."""
    rows, lr = ranks * micro, 1e-4 if lora else 1e-5
    return Pipeline(
        data=Data(sources="Dahoas/rm-static,Dahoas/full-hh-rlhf", stage_split="2,4,4"),
        model=Model(name=actor, gradient_checkpointing=True), lora=Lora(rank=lora, alpha=lora or 32.0),
        zero=Zero(stage=stage), sampling=Sampling(max_new_tokens=256),
        sft=Sft(epochs=1, batch_size=4 * rows, micro_batch_size=micro, lr=lr, eval_every=100),
        reward=Reward(model="facebook/opt-350m", epochs=1, batch_size=4 * rows, micro_batch_size=micro, lr=lr,
                      eval_every=100),
        ppo=Ppo(max_steps=500, rollout_batch_size=8 * rows, mini_batch_size=4 * rows, micro_batch_size=micro,
                lr_actor=lr, lr_critic=lr / 2, ema_decay=0.992),
        rollout=Rollout(micro_batch_size=8 * micro), checkpoint=Checkpoint(every_steps=100))


PRESETS: dict[str, Pipeline] = {
    # The embedded dialogue world and a model from random weights: minutes on two CPU cores. fp32, so that its figures
    # are the same where bf16 is in hardware, and because matrices this small gain nothing from it.
    "tiny": Pipeline(
        data=Data(sources="toy", rows=52_000, stage_split="3,5,2", max_prompt_tokens=64, max_response_tokens=64,
                  eval_rows=2048),
        model=Model(name="scratch", vocab_size=600, dtype="fp32"), zero=Zero(stage=2),
        sampling=Sampling(max_new_tokens=48),
        sft=Sft(max_steps=800, batch_size=20, micro_batch_size=10, lr=2.5e-3, eval_every=100),
        reward=Reward(max_steps=600, batch_size=16, micro_batch_size=8, lr=1e-3, scale=True, eval_every=100),
        ppo=Ppo(max_steps=24, rollout_batch_size=128, mini_batch_size=32, micro_batch_size=16, missing_eos_score=-1.0,
                eval_prompts=612),
        # PPO's objective: its kl_coef times 2.4, the deviation by which reward.scale divides the scores
        dpo=Dpo(max_steps=200, batch_size=16, micro_batch_size=8, lr=2e-4, beta=0.24, eval_every=50, eval_prompts=612),
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
        rollout=Rollout(micro_batch_size=8), checkpoint=Checkpoint(every_minutes=5)),
    # OPT-66B etc. at the sizes of DeepSpeed-Chat's published scripts. Not run: nobody here has had these machines.
    "opt-1.3b-1gpu": _opt("facebook/opt-1.3b", ranks=1, stage=0, lora=128, micro=8),
    "opt-13b-8gpu": _opt("facebook/opt-13b", ranks=8, stage=3, lora=0, micro=4),
    "opt-66b-64gpu": _opt("facebook/opt-66b", ranks=64, stage=3, lora=128, micro=2),
}


def get_preset(name: str) -> Pipeline:
    """The pipeline of that name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise error("--preset", repr(name), f"one of {', '.join(PRESETS)}",
                    f"did you mean {near[0]}?" if near else "the name")
    return PRESETS[name]
