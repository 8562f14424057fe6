"""Ranks that are started again meet each other, not what an earlier start left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from train.rendezvous import fresh

SIZE = 3
WAIT = timedelta(seconds=20)


def meet(store: TCPStore, count: int, ranks: range = range(SIZE)) -> list[list[str]]:
    """What each rank reads of all after having said its own."""

    def start(rank: int) -> list[str]:
        client = TCPStore("localhost", store.port, is_master=False)
        with fresh(client, rank=rank, size=SIZE, timeout=WAIT) as meeting:
            meeting.set(str(rank), f"{count} {rank}")
            return [meeting.get(str(other)).decode() for other in range(SIZE)]

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(start, ranks))


@pytest.fixture
def store() -> TCPStore:
    """What torchrun holds."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def test_every_start_reads_its_own_words(store: TCPStore) -> None:
    for count in range(5):
        assert meet(store, count) == [[f"{count} {rank}" for rank in range(SIZE)]] * SIZE


def test_a_rank_that_was_lost_before_it_met_the_others_does_not_count(store: TCPStore) -> None:
    """It has asked, and nobody has answered; the next of its name asks by another word."""
    with (
        pytest.raises(TimeoutError, match="rank 0 did not answer within"),
        fresh(store, rank=2, size=SIZE, timeout=timedelta(seconds=0.1)),
    ):
        pass
    assert meet(store, 1) == [[f"1 {rank}" for rank in range(SIZE)]] * SIZE
