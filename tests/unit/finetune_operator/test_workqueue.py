import asyncio
from itertools import pairwise

import pytest
from tests.support.time_limits import scaled

from finetune_operator.workqueue import FAIR, Urgency, WorkQueue


async def test_a_key_is_at_most_once_in_the_queue() -> None:
    queue = WorkQueue[str]()
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    assert [await queue.get(), await queue.get(), queue.depth] == ["a", "b", 0]


async def test_a_key_that_is_worked_on_comes_again_only_afterwards() -> None:
    queue = WorkQueue[str]()
    queue.add("a")
    key = await queue.get()
    queue.add("a")
    queue.add("a")
    assert queue.depth == 0
    queue.done(key)
    assert queue.depth == 1
    assert await queue.get() == "a"
    queue.done("a")
    assert queue.depth == 0


async def test_whoever_waits_is_woken() -> None:
    queue = WorkQueue[str]()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(waiting, scaled(1)) == "a"


async def test_the_earliest_of_several_delays_counts() -> None:
    queue = WorkQueue[str]()
    queue.add_after("a", 60)
    queue.add_after("a", 0.01)
    queue.add_after("a", 30)
    assert await asyncio.wait_for(queue.get(), scaled(1)) == "a"


async def test_now_beats_any_delay() -> None:
    queue = WorkQueue[str]()
    queue.add_after("a", 60)
    queue.add("a")
    assert await asyncio.wait_for(queue.get(), scaled(1)) == "a"
    queue.done("a")
    assert queue.depth == 0


async def test_failures_in_a_row_wait_longer_each_time_until_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, waits = WorkQueue[str](), list[float]()
    monkeypatch.setattr(queue, "add_after", lambda key, seconds: waits.append(seconds))
    for _ in range(12):
        queue.add_failed("a")
    assert waits[0] < 0.3
    assert all(later > 1.1 * earlier for earlier, later in pairwise(waits[:8]))
    assert max(waits) <= 75
    queue.succeeded("a")
    queue.add_failed("a")
    assert waits[-1] < 0.3


async def test_what_the_server_asks_for_is_waited_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, waits = WorkQueue[str](), list[float]()
    monkeypatch.setattr(queue, "add_after", lambda key, seconds: waits.append(seconds))
    queue.add_failed("a", at_least=7)
    assert waits == [7]


async def test_what_is_at_work_goes_before_what_is_new_and_that_before_what_has_ended() -> None:
    queue = WorkQueue[str]()
    queue.add("old", Urgency.LAST)
    queue.add("new", Urgency.NEW)
    queue.add("newer", Urgency.NEW)
    queue.add("now")
    assert [await queue.get() for _ in range(4)] == ["now", "new", "newer", "old"]


async def test_what_becomes_urgent_comes_at_once_and_once() -> None:
    queue = WorkQueue[str]()
    for key in ("a", "b", "c"):
        queue.add(key, Urgency.NEW)
    queue.add("c")
    queue.add("c", Urgency.LAST)
    assert queue.depth == 3
    assert [await queue.get() for _ in range(3)] == ["c", "a", "b"]
    assert queue.depth == 0


async def test_none_waits_for_ever_however_busy_the_others_are() -> None:
    queue = WorkQueue[str]()
    queue.add("old", Urgency.LAST)
    served = []
    for _ in range(FAIR):
        queue.add("busy")
        served.append(await queue.get())
        queue.done(served[-1])
    assert served.count("old") == 1
