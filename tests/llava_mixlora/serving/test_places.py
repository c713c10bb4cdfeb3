"""So many requests are answered at a time, so many wait, and the rest is told so."""

import asyncio

import pytest

from llava_mixlora.serving.places import Places
from llava_mixlora.serving.request_error import RequestError

pytestmark = pytest.mark.one_stack


async def hold(places, release, order, name):
    async with places.one():
        order.append(name)
        await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_wait_in_their_order_and_the_rest_is_refused():
    async def scenario():
        places, release, order = Places(1, 2), asyncio.Event(), []
        tasks = [asyncio.create_task(hold(places, release, order, name)) for name in "abc"]
        await settle()
        assert order == ["a"] and places.counts() == {"answering": 1, "waiting": 2}
        with pytest.raises(RequestError, match="1 requests are being answered and 2 wait") as refusal:
            async with places.one():
                pass
        assert refusal.value.status == 429
        release.set()
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c"] and places.counts() == {"answering": 0, "waiting": 0}

    asyncio.run(scenario())


def test_who_leaves_frees_a_place_whether_it_waits_or_has_one():
    async def scenario():
        places, release, order = Places(1, 8), asyncio.Event(), []
        first, second, third = (asyncio.create_task(hold(places, release, order, name)) for name in "abc")
        await settle()
        second.cancel()
        await settle()
        assert places.counts() == {"answering": 1, "waiting": 1}
        first.cancel()
        await settle()
        assert order == ["a", "c"] and places.counts() == {"answering": 1, "waiting": 0}
        release.set()
        await third
        assert places.counts() == {"answering": 0, "waiting": 0}

    asyncio.run(scenario())
