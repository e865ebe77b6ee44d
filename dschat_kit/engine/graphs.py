"""Decode steps as CUDA graphs: all kernels of a step are started by one call, whatever Python costs.

A graph replays the same kernels on the same memory, so a step computes every slot, active or not, and reads a number of
columns that is a power of two; each such number is captured once. Sampling stays outside. Not run on a GPU so far: the
tests compare the very step that is captured with the others on a CPU, and show that it asks for no value on the way.
"""

import torch
from torch import Tensor, nn

from dschat_kit.engine.attention import KVSlots
from dschat_kit.engine.decode import Slots

LEAST = 64
"""Columns that the smallest graph reads."""


class GraphedSlots(Slots):
    """`Slots` whose steps are captured and replayed; with `capture=False` the same steps run as they come.

    Holds on to the model's weights and the slots' memory: it must not outlive either.
    """

    def __init__(self, model: nn.Module, kv: KVSlots, device: torch.device, capture: bool = True):
        super().__init__(model, kv)
        self.capture, self._graphs = capture, {}
        self._tokens, self._positions = torch.zeros(2, kv.slots, dtype=torch.long, device=device)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As Slots.step."""
        for memory, new in ((self._tokens, tokens), (self._positions, positions)):
            memory.zero_()  # a free slot is fed token 0 at column 0, which its next prompt overwrites
            memory[:len(new)] = new
        used = max(LEAST, 1 << int(positions.max()).bit_length())
        return self._replay(min(used, self.kv.length))[:len(tokens)]

    def _forward(self, used: int) -> Tensor:
        self.kv.advance(self._positions, used)
        return self.model(input_ids=self._tokens[:, None], position_ids=self._positions[:, None], use_cache=False,
                          cache=self.kv).logits[:, 0]

    def _replay(self, used: int) -> Tensor:
        if not self.capture:
            return self._forward(used)
        if used not in self._graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate their workspaces in the first calls, outside the graph
                self._forward(used)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(used)
            self._graphs[used] = graph, logits
        graph, logits = self._graphs[used]
        graph.replay()
        return logits
