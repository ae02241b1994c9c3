import asyncio

import uvloop

ran: set[bool] = set()


async def test_an_async_test_runs_on_the_loop_that_it_names(request):
    loop = asyncio.get_running_loop()
    assert isinstance(loop, uvloop.Loop) == ("uvloop" in request.node.name)
    ran.add(isinstance(loop, uvloop.Loop))


def test_async_tests_run_on_both_loops():
    """The test before this one did."""
    assert ran == {False, True}
