import asyncio

import uvloop


async def test_async_tests_run_on_both_loops(request):
    loop = asyncio.get_running_loop()
    assert isinstance(loop, uvloop.Loop) == ("uvloop" in request.node.name)
