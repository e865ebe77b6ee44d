#!/usr/bin/env bash
# One base model for four roles: PPO's memory with and without lora.share_base. Prints the table of memory.md.
#     bash docs/results/memory.sh [FOLDER]
set -euo pipefail
out=${1:-runs/memory}
sets="data.rows=300 data.eval_rows=16 model.hidden_size=768 model.layers=8 model.heads=12 model.intermediate_size=2048
    model.initializer_range=0.02 model.vocab_size=400 model.dtype=fp32 lora.rank=16 zero.stage=2
    sampling.max_new_tokens=8 sft.max_steps=1 sft.batch_size=4 sft.micro_batch_size=4 sft.eval_rows=8
    reward.max_steps=1 reward.batch_size=2 reward.micro_batch_size=2 reward.eval_rows=8 ppo.max_steps=2
    ppo.rollout_batch_size=4 ppo.mini_batch_size=4 ppo.micro_batch_size=4 ppo.eval_prompts=4 rollout.micro_batch_size=4
    checkpoint.every_steps=0"
for stage in sft reward; do
    dschat "$stage" --preset tiny --run-root "$out/three" --num-gpus 1 --set $sets
done
mkdir -p "$out/one" && cp -r "$out/three/data" "$out/three/sft" "$out/three/reward" "$out/one/"
for share in false true; do
    root=$([ $share = true ] && echo one || echo three)
    dschat ppo --preset tiny --run-root "$out/$root" --num-gpus 1 --set $sets lora.share_base=$share
done
python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path
found = {name: json.loads((Path(sys.argv[1]) / name / "ppo/result.json").read_text())["memory_mb"] for name in ("three", "one")}
print("| phase | three models, MB | one base, MB | saved, MB |\n|---|---|---|---|")
for phase in ("generation", "scoring", "training"):
    three, one = (found[name][phase] for name in ("three", "one"))
    print(f"| {phase} | {three:.0f} | {one:.0f} | {three - one:.0f} |")
PYTHON
