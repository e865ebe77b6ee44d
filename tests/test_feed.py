"""Which prompts an iteration asks: every row once an epoch, the same whatever the number of ranks, without reading
more of the table than it needs."""

from types import SimpleNamespace

import pytest

from dschat_kit.train import prompts
from dschat_kit.train.prompts import PromptFeed


class Rows:
    """Rows whose prompts repeat after ten."""

    def __init__(self, count: int):
        self.count, self.table = count, {"prompt": [f"prompt {i % 10}" for i in range(count)]}

    def __len__(self) -> int:
        return self.count

    def take(self, indices) -> list[dict]:
        return [{"prompt_ids": [1] * (1 + i % 3), "sample_id": str(i), "prompt": self.table["prompt"][i],
                 "source": "toy"} for i in indices]


def asked(feed_of, step: int, ranks: int) -> list[tuple[int, int]]:
    """(row, seed) of each place of the global batch."""
    parts = [feed_of(SimpleNamespace(world_size=ranks, rank=rank, device="cpu")).at(step) for rank in range(ranks)]
    rows = [list(zip(map(int, part.batch.sample_ids), part.request.row_seeds.tolist(), strict=True)) for part in parts]
    return [pair for places in zip(*rows, strict=True) for pair in places]


@pytest.mark.parametrize("samples", [1, 2])
def test_an_epoch_asks_every_row_once_on_any_number_of_ranks(samples):
    def feed_of(session):
        return PromptFeed(Rows(12), 8 * samples, 3, 0, session, samples=samples)
    one, two = ([asked(feed_of, step, ranks) for step in range(3)] for ranks in (1, 2))
    assert one == two
    rows = [row for step in one for row, _ in step[:8]]  # 2 epochs of 12 in 3 steps of 8
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12)) and rows[:12] != rows[12:]
    assert all([row for row, _ in step] == [row for row, _ in step[:8]] * samples for step in one)
    seeds = [seed for step in one for _, seed in step]
    assert len(set(seeds)) == len(seeds)


def test_held_out_prompts_are_asked_in_order_and_more_answers_ask_again():
    found = asked(lambda session: PromptFeed(Rows(25), 13, 3, 0, session, unique=True), 0, 1)
    assert [row for row, _ in found] == [*range(10), 0, 1, 2] and len({seed for _, seed in found}) == 13


def test_a_step_shuffles_once_an_epoch_and_reads_no_column(monkeypatch):
    """With a million rows a permutation for each prompt took longer than the answers."""
    calls, order = [], prompts.epoch_order
    monkeypatch.setattr(prompts, "epoch_order", lambda *how: calls.append(how) or order(*how))
    rows = Rows(100)
    table, rows.table = rows.table, None
    feed = PromptFeed(rows, 64, 3, 0, SimpleNamespace(world_size=1, rank=0, device="cpu"))
    rows.table = table
    feed.at(1)  # 36 rows of the first epoch, 28 of the second
    assert [epoch for *_, epoch in calls] == [0, 1]
