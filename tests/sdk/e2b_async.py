"""The asynchronous Python SDK: what it does another way than the synchronous one."""

import asyncio
from importlib.metadata import version

from e2b import AsyncSandbox
from e2b.sandbox.filesystem.watch_handle import FilesystemEventType

from story import DEADLINE, scenario, tell


def run(story):
    """A scenario that is a coroutine."""

    def told(context):
        asyncio.run(asyncio.wait_for(story(context), 4 * DEADLINE))

    told.__name__, told.__doc__ = story.__name__, story.__doc__
    return scenario(told)


@run
async def commands_side_by_side(_):
    """commands run side by side and are told apart"""
    sandbox = await AsyncSandbox.create("base", timeout=300)
    done = await asyncio.gather(*(sandbox.commands.run(f"sleep 0.2; echo {n}") for n in range(8)))
    assert [d.stdout for d in done] == [f"{n}\n" for n in range(8)], done
    handle = await sandbox.commands.run("cat", background=True, stdin=True)
    await sandbox.commands.send_stdin(handle.pid, "x")
    await sandbox.commands.close_stdin(handle.pid)
    assert (await handle.wait()).stdout == "x"
    assert await sandbox.kill()


@run
async def watch_by_stream(_):
    """a watched folder's events are pushed"""
    sandbox = await AsyncSandbox.create("base", timeout=300)
    await sandbox.files.make_dir("/tmp/watched")
    seen, came = set(), asyncio.Event()

    def on_event(event):
        seen.add((event.name, event.type))
        if ("file", FilesystemEventType.WRITE) in seen:
            came.set()

    handle = await sandbox.files.watch_dir("/tmp/watched", on_event=on_event)
    await sandbox.files.write("/tmp/watched/file", "text")
    await asyncio.wait_for(came.wait(), DEADLINE)
    assert ("file", FilesystemEventType.CREATE) in seen, seen
    await handle.stop()
    stream = await sandbox.files.read("/tmp/watched/file", format="stream")
    assert b"".join([part async for part in stream]) == b"text"
    assert await sandbox.kill()


if __name__ == "__main__":
    print(f"e2b {version('e2b')} for Python, asynchronous", flush=True)
    tell(None)
