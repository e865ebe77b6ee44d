"""On a GPU: the hybrid engine says what plain transformers says, with and without CUDA graphs."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_decode import SAMPLING, request, responses  # noqa: E402
from tiny_models import causal_lm  # noqa: E402

from dschat_kit.engine.attention import FAMILIES  # noqa: E402
from dschat_kit.engine.hybrid import HybridEngine  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Engine:
    """What the hybrid engine reads of DeepSpeed's, in one process."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cuda")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_graphs_change_no_token(architecture):
    asked = request(lengths=(3, 9, 4, 1, 7, 9, 2, 5))
    asked = replace(asked, prompt_ids=asked.prompt_ids.cuda(), prompt_attention_mask=asked.prompt_attention_mask.cuda())
    found = {}
    for graphs in (False, True):
        engine = HybridEngine(Engine(causal_lm(architecture).cuda()), micro_batch_size=4, cuda_graphs=graphs,
                              release_inference_cache=False)
        found[graphs] = [responses(engine.generate(asked, SAMPLING)) for _ in range(2)]  # captured, then replayed
        assert engine.path == "slots", engine.reason
    assert found[True] == found[False] and found[True][0] == found[True][1]


@pytest.mark.parametrize("graphs", [False, True])
def test_logprobs_are_those_of_a_forward_pass(graphs):
    model, asked = causal_lm("llama").cuda(), request()
    asked = replace(asked, prompt_ids=asked.prompt_ids.cuda(), prompt_attention_mask=asked.prompt_attention_mask.cuda())
    batch = HybridEngine(Engine(model), micro_batch_size=4, cuda_graphs=graphs).generate(asked, SAMPLING)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask.long(),
                       position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0)).logits
    every = logits[:, asked.prompt_ids.shape[1] - 1:-1].log_softmax(-1)
    tokens = batch.input_ids[:, asked.prompt_ids.shape[1]:]
    expected = every.gather(2, tokens[..., None]).squeeze(2)
    assert torch.allclose(batch.logprobs[batch.response_mask], expected[batch.response_mask], atol=1e-4)
