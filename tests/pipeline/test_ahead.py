"""Things made ahead come in order, from wherever asked; errors come out where they are waited for."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Generator
from itertools import count

import pytest
from moments import at_moment, interrupted

from pipeline.ahead import Ahead


def numbers(position: int) -> Generator[int]:
    yield from count(position)


def started(make: Callable[[int], Generator[int]], depth: int) -> Ahead[int]:
    ahead = Ahead(make, depth)
    ahead.start()
    return ahead


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "moleprint-loader"]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order_from_wherever_asked(depth: int) -> None:
    draw, position = random.Random(depth), 5
    ahead = started(numbers, depth)
    for _ in range(300):
        if draw.random() < 0.3:
            position = draw.randrange(100)
        assert ahead.get(position) == position
        position += 1
    ahead.close()


def test_no_more_is_made_than_there_is_room_for() -> None:
    made = []

    def make(position: int) -> Generator[int]:
        for number in numbers(position):
            made.append(number)
            yield number

    ahead = started(make, depth=3)
    time.sleep(0.01)
    assert not made, "nothing before the first is asked for"
    for got in range(4):
        ahead.get(got)
        deadline = time.monotonic() + 5
        while len(made) < got + 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == list(range(got + 4))
    ahead.close()


def test_an_error_comes_after_the_items_before_it_and_others_can_be_asked_for() -> None:
    def make(position: int) -> Generator[int]:
        for number in numbers(position):
            if number == 3:
                raise LookupError("three")
            yield number

    ahead = started(make, depth=8)
    assert [ahead.get(position) for position in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(LookupError, match="three"):
            ahead.get(3)
    assert [ahead.get(position) for position in (1, 2, 4)] == [1, 2, 4]
    ahead.close()


def test_what_never_began_can_be_closed() -> None:
    Ahead(numbers, depth=1).close()
    assert not running()


def test_closing_ends_a_wait_for_an_item() -> None:
    """As a signal's handler may, or another thread."""
    go = threading.Event()

    def make(position: int) -> Generator[int]:
        go.wait()
        yield from numbers(position)

    ahead = started(make, depth=1)
    closing = threading.Timer(0.05, ahead.close)
    closing.start()
    with pytest.raises(ValueError, match="closed"):
        ahead.get(0)
    go.set()
    closing.join()
    assert not running()


def test_closing_waits_for_the_thread_though_it_was_interrupted_before(plain_ctrl_c: None) -> None:
    go, making = threading.Event(), threading.Event()

    def make(position: int) -> Generator[int]:
        yield position
        making.set()
        go.wait()

    ahead = started(make, depth=2)
    ahead.get(0)
    making.wait()
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
        ahead.close()
    threading.Timer(0.1, go.set).start()
    ahead.close()
    assert go.is_set() and not running()


def test_closing_at_any_moment_of_a_get_ends_it() -> None:
    for moment in count():
        ahead = started(numbers, depth=2)
        begun = at_moment(lambda ahead=ahead: closed(ahead), moment, ahead.close)
        ahead.close()
        assert not running()
        if not begun:
            break
    assert moment > 50


def closed(ahead: Ahead[int]) -> None:
    """Ask for two, and be told perhaps that there are no more."""
    with contextlib.suppress(ValueError):
        for position in (0, 1):
            ahead.get(position)


def test_closing_ends_the_thread_whatever_it_does() -> None:
    ended = []

    def make(position: int) -> Generator[int]:
        try:
            yield from numbers(position)
        finally:
            ended.append(position)

    for takes in (0, 1, 3):
        ahead = started(make, depth=1)
        for position in range(takes, 2 * takes):
            ahead.get(position)
        ahead.close()
        ahead.close()
        with pytest.raises(ValueError, match="closed"):
            ahead.get(0)
    assert ended == [1, 3], "generators are closed, in the thread that ran them"
    assert not running()


@pytest.mark.parametrize("depth", [1, 3])
def test_ctrl_c_at_any_moment_loses_no_item_and_lets_it_end(depth: int) -> None:
    for moment in count():
        ahead = started(numbers, depth)
        came = interrupted(lambda ahead=ahead: [ahead.get(position) for position in (0, 1, 7)], moment)
        assert [ahead.get(position) for position in (1, 2)] == [1, 2]
        ahead.close()
        assert not running()
        if not came:
            break
    assert moment > 100


def test_ctrl_c_at_any_moment_of_closing_lets_it_close_again() -> None:
    for moment in count():
        ahead = started(numbers, depth=2)
        ahead.get(0)
        came = interrupted(ahead.close, moment)
        ahead.close()
        assert not running()
        if not came:
            break
    assert moment > 20
