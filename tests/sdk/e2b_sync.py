"""The synchronous Python SDK against a running service; E2B_API_URL, E2B_SANDBOX_URL, E2B_API_KEY."""

import io
import os
import subprocess
import urllib.error
import urllib.request
from importlib.metadata import version
from types import SimpleNamespace

from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)
from e2b.sandbox.filesystem.filesystem import FileType
from e2b.sandbox.filesystem.watch_handle import FilesystemEventType

from story import raises, scenario, tell, wait_for

# Between 2.45.1 and 2.63.0 the SDK learned to create over /v2 and to stream input.
NEWER = tuple(map(int, version("e2b").split("."))) >= (2, 63)


@scenario
def create(t):
    """a sandbox is made with metadata and environment, and knows itself"""
    t.sandbox = Sandbox.create("base", timeout=600, metadata={"test": t.run, "a b": "c&d=ü"}, envs={"COLOR": "blue"})
    assert t.sandbox.sandbox_id.isalnum(), t.sandbox.sandbox_id
    assert t.sandbox.is_running()
    info = t.sandbox.get_info()
    assert (info.sandbox_id, info.state) == (t.sandbox.sandbox_id, SandboxState.RUNNING)
    assert info.metadata == {"test": t.run, "a b": "c&d=ü"}, info.metadata
    assert (info.cpu_count, info.template_id) == (1, "base"), info
    assert info.memory_mb > 100, info
    assert 0 < (info.end_at - info.started_at).total_seconds() <= 601


@scenario
def run_in_foreground(t):
    """a command's output, environment, user, folder and exit code come back"""
    run = t.sandbox.commands.run
    done = run("echo out; echo err >&2")
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n", "err\n", 0), done
    assert run('echo "$COLOR $SIZE"; whoami; pwd', envs={"SIZE": "1"}).stdout == "blue 1\nuser\n/home/user\n"
    assert run("whoami; pwd", user="root", cwd="/usr/share").stdout == "root\n/usr/share\n"
    assert run("sudo whoami").stdout == "root\n"
    failed = raises(CommandExitException, lambda: run("echo no >&2; exit 7"))
    assert (failed.exit_code, failed.stderr) == (7, "no\n"), failed
    text = "grüße 🦀"
    assert run(f"echo '{text}'").stdout == text + "\n"
    raises(AuthenticationException, lambda: run("true", user="nobody-here"))
    raises(InvalidArgumentException, lambda: run("true", cwd="/no/such/folder"))


@scenario
def output_is_streamed(t):
    """output arrives while the command runs"""
    seen = []

    def on_stdout(text):
        seen.append(text)
        if text == "ready\n":
            # It goes on only because its output came here.
            t.sandbox.files.write("/tmp/go", "")

    script = "echo ready; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo gone"
    done = t.sandbox.commands.run(script, on_stdout=on_stdout)
    assert seen == ["ready\n", "gone\n"], seen
    assert done.stdout == "ready\ngone\n"
    # More than any buffer on the way holds.
    many = t.sandbox.commands.run("yes 0123456789abcde | head -c 4194304")
    assert len(many.stdout) == 4 << 20 and set(many.stdout.split()) == {"0123456789abcde"}


@scenario
def run_in_background(t):
    """a background command is listed, fed, left, joined again, and waited for"""
    commands = t.sandbox.commands
    handle = commands.run("while read line; do echo got $line; done; echo end", background=True, stdin=True)
    listed = [p for p in commands.list() if p.pid == handle.pid]
    assert len(listed) == 1 and listed[0].cmd == "/bin/bash", listed
    assert listed[0].args[:2] == ["-l", "-c"], listed
    commands.send_stdin(handle.pid, "one\n")
    for stdout, _, _ in handle:
        if stdout:
            assert stdout == "got one\n", stdout
            break
    handle.disconnect()
    again = commands.connect(handle.pid)
    assert again.pid == handle.pid
    commands.send_stdin(handle.pid, "two\n")
    commands.close_stdin(handle.pid)
    done = again.wait()
    assert (done.stdout, done.exit_code) == ("got two\nend\n", 0), done
    raises(NotFoundException, lambda: commands.connect(handle.pid))
    raises(NotFoundException, lambda: commands.send_stdin(handle.pid, "x"))


@scenario
def input_is_streamed(t):
    """input that comes bit by bit travels in one request"""
    if not NEWER:
        return
    handle = t.sandbox.commands.run("cat", background=True, stdin=True)
    t.sandbox.commands.stream_input(handle.pid, (f"{n}\n" for n in range(100)))
    t.sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout.split() == [str(n) for n in range(100)]


@scenario
def kill_commands(t):
    """a command is killed once; its end says so"""
    handle = t.sandbox.commands.run("sleep 3600", background=True)
    assert t.sandbox.commands.kill(handle.pid) is True
    ended = raises(CommandExitException, handle.wait)
    assert ended.exit_code != 0, ended
    wait_for("the process is gone", lambda: all(p.pid != handle.pid for p in t.sandbox.commands.list()))
    assert t.sandbox.commands.kill(handle.pid) is False


@scenario
def commands_have_timeouts(t):
    """a command ends when its time is up"""
    raises(TimeoutException, lambda: t.sandbox.commands.run("exec sleep 3599", timeout=2))
    gone = "! pgrep -f 'sleep 359[9]'"
    wait_for("the command is gone", lambda: t.sandbox.commands.run(f"{gone} && echo gone || true").stdout)


@scenario
def terminal(t):
    """a terminal has a size, takes keys, is resized, and killed"""
    pty = t.sandbox.pty
    handle = pty.create(PtySize(rows=30, cols=100), envs={"A": "b"}, cwd="/tmp")
    seen = b""
    pty.send_stdin(handle.pid, b"stty size; echo $A; pwd; tty\n")

    def read_until(wanted):
        nonlocal seen
        for _, _, data in handle:
            seen += data or b""
            if wanted in seen:
                return
        raise AssertionError(f"{wanted} is not in {seen}")

    read_until(b"/dev/pts/")
    assert b"30 100\r\nb\r\n/tmp\r\n" in seen, seen
    pty.resize(handle.pid, PtySize(rows=40, cols=120))
    pty.send_stdin(handle.pid, b"stty size; exit 3\n")
    read_until(b"40 120")
    ended = raises(CommandExitException, handle.wait)
    assert ended.exit_code == 3, ended
    other = pty.create(PtySize(rows=24, cols=80))
    joined = pty.connect(other.pid)
    pty.send_stdin(other.pid, b"echo jo''ined\n")
    text = b""
    for _, _, data in joined:
        text += data or b""
        if b"joined" in text:
            break
    assert pty.kill(other.pid) is True
    wait_for("the terminal is gone", lambda: pty.kill(other.pid) is False)


@scenario
def write_and_read(t):
    """files go up and come down: text, bytes, streams, several at once, compressed"""
    files = t.sandbox.files
    info = files.write("hello.txt", "grüße\n")
    assert (info.path, info.name, info.type) == ("/home/user/hello.txt", "hello.txt", FileType.FILE), info
    assert files.read("hello.txt") == "grüße\n"
    assert files.read("~/hello.txt") == files.read("/home/user/./x/../hello.txt") == "grüße\n"
    assert t.sandbox.commands.run("stat -c '%U %a' hello.txt").stdout == "user 644\n"
    body = bytes(range(256)) * 8192
    files.write("/tmp/deep/er/bytes", body)
    assert bytes(files.read("/tmp/deep/er/bytes", format="bytes")) == body
    files.write("/tmp/stream", io.BytesIO(body))
    assert b"".join(files.read("/tmp/stream", format="stream")) == body
    files.write("/tmp/packed", body, gzip=True)
    assert bytes(files.read("/tmp/packed", format="bytes", gzip=True)) == body
    many = files.write_files([{"path": f"/tmp/many/{n}", "data": str(n)} for n in range(3)])
    assert [m.path for m in many] == ["/tmp/many/0", "/tmp/many/1", "/tmp/many/2"], many
    assert files.read("/tmp/many/2") == "2"
    files.write("/tmp/many/2", "")
    assert files.read("/tmp/many/2") == ""
    assert files.write("/root/hers", "x", user="root").path == "/root/hers"
    assert t.sandbox.commands.run("stat -c %U /root/hers", user="root").stdout == "root\n"
    raises(NotFoundException, lambda: files.read("/no/such/file"))
    raises(InvalidArgumentException, lambda: files.read("/tmp"))
    raises(InvalidArgumentException, lambda: files.write("/tmp", "a folder"))


@scenario
def file_metadata(t):
    """what an uploader notes about a file is kept with it"""
    files = t.sandbox.files
    files.write("/tmp/noted", "x", metadata={"author": "me", "step": "3"})
    assert files.get_info("/tmp/noted").metadata == {"author": "me", "step": "3"}
    seen = t.sandbox.commands.run("python3 -c \"import os; print(os.getxattr('/tmp/noted', 'user.e2b.step'))\"")
    assert seen.stdout == "b'3'\n", seen


@scenario
def signed_urls(t):
    """a signed URL opens one file, for as long as it says"""
    t.sandbox.files.write("/tmp/a b", "signed")
    url = t.sandbox.download_url("/tmp/a b", use_signature_expiration=300)
    assert urllib.request.urlopen(url).read() == b"signed"
    refused = raises(urllib.error.HTTPError, lambda: urllib.request.urlopen(url.replace("a%20b", "other")))
    assert refused.code == 401, refused
    late = t.sandbox.download_url("/tmp/a b", use_signature_expiration=-5)
    assert raises(urllib.error.HTTPError, lambda: urllib.request.urlopen(late)).code == 401
    url = t.sandbox.upload_url("/tmp/up")
    put = urllib.request.Request(url, b"put", {"Content-Type": "application/octet-stream"}, method="POST")
    assert urllib.request.urlopen(put).status == 200
    assert t.sandbox.files.read("/tmp/up") == "put"


@scenario
def folders(t):
    """folders are made, listed, looked at, renamed and removed"""
    files = t.sandbox.files
    assert files.make_dir("tree/a/b") is True
    assert files.make_dir("tree/a/b") is False
    files.write("tree/a/file", "12345")
    t.sandbox.commands.run("ln -s a/file tree/link; chmod 640 tree/a/file")
    names = lambda entries: sorted((e.name, e.type) for e in entries)
    assert names(files.list("tree")) == [("a", FileType.DIR), ("link", FileType.SYMLINK)]
    deep = files.list("/home/user/tree", depth=3)
    assert sorted(e.path for e in deep) == [f"/home/user/tree/{p}" for p in ("a", "a/b", "a/file", "link")]
    info = files.get_info("tree/a/file")
    assert (info.size, info.mode, info.permissions) == (5, 0o640, "-rw-r-----"), info
    assert (info.owner, info.group, info.type) == ("user", "user", FileType.FILE), info
    assert abs((info.modified_time - t.sandbox.get_info().started_at).total_seconds()) < 3600, info
    assert files.get_info("tree/link").symlink_target == "a/file"
    assert files.get_info("/tmp").permissions == "dtrwxrwxrwx"
    assert files.exists("tree/a/file") and not files.exists("tree/a/none")
    moved = files.rename("tree/a/file", "tree/c/moved")
    assert (moved.path, moved.size) == ("/home/user/tree/c/moved", 5), moved
    assert not files.exists("tree/a/file")
    raises(NotFoundException, lambda: files.rename("tree/none", "tree/other"))
    raises(NotFoundException, lambda: files.list("/no/such/folder"))
    raises(NotFoundException, lambda: files.get_info("/no/such/file"))
    files.remove("tree")
    assert not files.exists("tree")
    files.remove("tree")


@scenario
def watch(t):
    """what happens in a watched folder is told"""
    files = t.sandbox.files
    files.make_dir("/tmp/watched/below")
    handle = files.watch_dir("/tmp/watched", recursive=True, include_entry=True)
    seen = {}

    def saw(name, kind):
        for event in handle.get_new_events():
            seen.setdefault((event.name, event.type), event)
        return seen.get((name, kind))

    kinds = FilesystemEventType
    files.write("/tmp/watched/one", "1")
    wait_for("one is made", lambda: saw("one", kinds.CREATE))
    written = wait_for("one is written", lambda: saw("one", kinds.WRITE))
    assert written.entry.size == 1, written
    files.make_dir("/tmp/watched/new/er")
    files.write("/tmp/watched/new/er/two", "2")
    wait_for("two is made, in a folder that is new", lambda: saw("new/er/two", kinds.CREATE))
    t.sandbox.commands.run("cd /tmp/watched; chmod 600 one; mv one three; rm new/er/two; echo x >>below/in")
    for name, kind in [
        ("one", kinds.CHMOD),
        ("one", kinds.RENAME),
        ("three", kinds.CREATE),
        ("new/er/two", kinds.REMOVE),
        ("below/in", kinds.WRITE),
    ]:
        wait_for(f"{name} {kind}", lambda: saw(name, kind))
    assert not [name for name, _ in seen if "rethaw" in name], seen
    handle.stop()
    raises(SandboxException, handle.get_new_events)
    raises(NotFoundException, lambda: files.watch_dir("/no/such/folder"))


@scenario
def listed_by_page(t):
    """sandboxes are found by metadata, state, and page by page"""
    others = [Sandbox.create("base", timeout=300, metadata={"test": t.run, "n": str(n)}) for n in range(2)]
    query = SandboxQuery(metadata={"test": t.run})
    wanted = {t.sandbox.sandbox_id, *(o.sandbox_id for o in others)}
    pages = Sandbox.list(query=query, limit=2)
    first = pages.next_items()
    assert len(first) == 2 and pages.has_next
    second = pages.next_items()
    assert len(second) == 1 and not pages.has_next
    assert {s.sandbox_id for s in first + second} == wanted
    starts = [s.started_at for s in first + second]
    assert starts == sorted(starts, reverse=True), starts
    odd = SandboxQuery(metadata={"test": t.run, "a b": "c&d=ü"})
    assert [s.sandbox_id for s in Sandbox.list(query=odd).next_items()] == [t.sandbox.sandbox_id]
    if NEWER:
        rising = Sandbox.list(query=query, order="asc", limit=2)
        found = rising.next_items() + rising.next_items()
        assert [s.started_at for s in found] == sorted(starts), found
    assert others[0].kill() is True and others[0].kill() is False
    assert others[0].is_running() is False
    paused = SandboxQuery(metadata={"test": t.run}, state=[SandboxState.PAUSED])
    assert Sandbox.list(query=paused).next_items() == []
    t.other = others[1]


@scenario
def timeouts(t):
    """a life time is set, and kept by those who connect with a shorter one"""
    t.other.set_timeout(900)
    end = t.other.get_info().end_at
    assert 800 < (end - t.other.get_info().started_at).total_seconds() < 960
    same = Sandbox.connect(t.other.sandbox_id, timeout=60)
    assert same.get_info().end_at == end, "never shorter"
    longer = Sandbox.connect(t.other.sandbox_id, timeout=1800)
    assert longer.get_info().end_at > end
    assert same.commands.run("echo same").stdout == "same\n"
    short = Sandbox.create("base", timeout=1)
    wait_for("its time is up", lambda: not short.is_running())
    raises(NotFoundException, short.get_info)
    raises(TimeoutException, lambda: short.commands.run("true"))


@scenario
def pause_and_resume(t):
    """a paused sandbox comes back with its processes, files and watchers; the old handle works"""
    sandbox = t.other
    counter = "n=0; while true; do n=$((n+1)); echo $n >/tmp/count; sleep 0.05; done"
    pid = sandbox.commands.run(counter, background=True, timeout=0).pid
    watched = sandbox.files.watch_dir("/tmp")
    wait_for("it counts", lambda: sandbox.files.exists("/tmp/count"))
    assert sandbox.pause() is True
    assert sandbox.pause() is False
    assert sandbox.is_running() is False
    assert sandbox.get_info().state == SandboxState.PAUSED
    query = SandboxQuery(metadata={"test": t.run}, state=[SandboxState.PAUSED])
    assert [s.sandbox_id for s in Sandbox.list(query=query).next_items()] == [sandbox.sandbox_id]
    raises(TimeoutException, lambda: sandbox.commands.run("true"))
    # The handle keeps its token: what connect answers is not looked at by all SDKs.
    sandbox.connect(timeout=600)
    assert sandbox.is_running()
    assert pid in [p.pid for p in sandbox.commands.list()]
    before = int(sandbox.files.read("/tmp/count") or 0)
    wait_for("it counts on", lambda: int(sandbox.files.read("/tmp/count") or 0) > before)
    assert watched.get_new_events(), "the watcher was there all the time"
    assert sandbox.commands.kill(pid) is True


@scenario
def fork(t):
    """a fork has the same memory and files, and a life of its own"""
    source = t.sandbox
    source.files.write("/tmp/mark", "source")
    pid = source.commands.run("sleep 3600", background=True, timeout=0).pid
    clones = source.fork(count=2, timeout=300)
    assert len(clones) == 2 and not [c for c in clones if isinstance(c, Exception)], clones
    ids = {source.sandbox_id, *(c.sandbox_id for c in clones)}
    assert len(ids) == 3, ids
    hosts = {s.commands.run("cat /etc/machine-id").stdout for s in [source, *clones]}
    assert len(hosts) == 3, hosts
    for n, clone in enumerate(clones):
        assert clone.files.read("/tmp/mark") == "source"
        assert pid in [p.pid for p in clone.commands.list()]
        clone.files.write("/tmp/mark", str(n))
    assert source.files.read("/tmp/mark") == "source"
    assert clones[0].files.read("/tmp/mark") == "0"
    source.commands.kill(pid)
    for clone in clones:
        assert clone.kill()


@scenario
def snapshots(t):
    """a snapshot outlives what it was taken of, and others are made from it"""
    source = Sandbox.create("base", timeout=300, metadata={"test": t.run}, envs={"COLOR": "red"})
    source.files.write("/tmp/mark", "then")
    pid = source.commands.run("sleep 3600", background=True, timeout=0).pid
    taken = source.create_snapshot()
    source.files.write("/tmp/mark", "later")
    listed = Sandbox.list_snapshots(sandbox_id=source.sandbox_id).next_items()
    assert [s.snapshot_id for s in listed] == [taken.snapshot_id], listed
    assert source.kill()
    made = [Sandbox.create(taken.snapshot_id, timeout=300) for _ in range(2)]
    assert len({m.commands.run("cat /etc/machine-id").stdout for m in made}) == 2
    for sandbox in made:
        assert sandbox.files.read("/tmp/mark") == "then"
        assert pid in [p.pid for p in sandbox.commands.list()]
        assert sandbox.commands.run("echo $COLOR").stdout == "red\n"
    assert Sandbox.delete_snapshot(taken.snapshot_id) is True
    assert Sandbox.delete_snapshot(taken.snapshot_id) is False
    assert made[0].pause() and made[0].connect().files.read("/tmp/mark") == "then"
    raises(Exception, lambda: Sandbox.create(taken.snapshot_id))
    for sandbox in made:
        assert sandbox.kill()


@scenario
def metrics(t):
    """what a sandbox uses can be asked for"""
    (now,) = t.sandbox.get_metrics()
    assert (now.cpu_count, now.mem_total > 100 << 20) == (1, True), now
    assert 0 < now.mem_used < now.mem_total and 0 < now.disk_used < now.disk_total, now
    assert 0 <= now.cpu_used_pct <= 100, now


@scenario
def tokens(t):
    """nobody gets in without the sandbox's token, or the key"""
    stranger = Sandbox.connect(t.sandbox.sandbox_id)
    assert stranger.files.exists("/tmp")
    url, key = os.environ["E2B_SANDBOX_URL"], os.environ["E2B_API_KEY"]
    for token in [{}, {"X-Access-Token": "sbx_wrong"}, {"X-API-KEY": key}]:
        headers = {"E2b-Sandbox-Id": t.sandbox.sandbox_id, **token}
        ask = urllib.request.Request(f"{url}/files?path=/etc/hostname", headers=headers)
        assert raises(urllib.error.HTTPError, lambda: urllib.request.urlopen(ask)).code == 401
    raises(AuthenticationException, lambda: Sandbox.create("base", api_key="e2b_00"))
    error = raises(Exception, lambda: Sandbox.create("no-such-template"))
    assert "no-such-template" in str(error), error


@scenario
def host_names(t):
    """the data plane is found by host name, too"""
    host = t.sandbox.get_host(49983)
    assert host.startswith(f"49983-{t.sandbox.sandbox_id}.localhost:"), host
    port = host.rsplit(":", 1)[1]
    curl = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--resolve", f"{host}:127.0.0.1"]
    status = lambda path: subprocess.run([*curl, f"http://{host}{path}"], capture_output=True, text=True, check=True).stdout
    assert port.isdigit() and status("/health") == "204"
    assert status("/sandboxes") == "404", "nothing else is served there"


@scenario
def refusals(t):
    """what cannot be done is refused by name"""
    gone = raises(NotFoundException, lambda: Sandbox.connect("a" * 20))
    assert "a" * 20 in str(gone), gone
    assert Sandbox.kill("a" * 20) is False
    error = raises(SandboxException, lambda: Sandbox.create("base", timeout=10**9))
    assert "timeout" in str(error), error
    error = raises(SandboxException, lambda: t.sandbox.pause(keep_memory=False))
    assert "memory" in str(error), error
    assert t.sandbox.is_running()


@scenario
def kill(t):
    """a killed sandbox is gone"""
    assert t.other.kill() is True
    assert t.sandbox.kill() is True
    assert t.sandbox.is_running() is False
    raises(NotFoundException, t.sandbox.get_info)
    raises(TimeoutException, lambda: t.sandbox.files.read("/etc/hostname"))
    assert Sandbox.list(query=SandboxQuery(metadata={"test": t.run})).next_items() == []


if __name__ == "__main__":
    print(f"e2b {version('e2b')} for Python", flush=True)
    tell(SimpleNamespace(run=f"py-{version('e2b')}-{os.getpid()}"))
