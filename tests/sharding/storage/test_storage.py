from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest

from cluster.local.processes import free_ports
from sharding.errors import UserError
from sharding.storage import (
    BucketNotFoundError,
    LocalStorage,
    NotFoundError,
    Storage,
    StorageUnavailableError,
    StoredObject,
    open_storage,
)
from sharding.storage.lock import Lock


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3").prefix())
    return open_storage(tmp_path / "store")


def test_objects_come_back_whole_and_by_range(storage: Storage) -> None:
    storage.write("a/b c.bin", b"0123456789")
    assert storage.read("a/b c.bin") == b"0123456789"
    assert storage.read_range("a/b c.bin", 3, 4) == b"3456"
    assert storage.read_range("a/b c.bin", 8, 100) == b"89"
    assert storage.read_range("a/b c.bin", 10, 5) == b""
    assert storage.read_range("a/b c.bin", 2, 0) == b""


def test_one_range_fills_one_buffer_after_the_other(storage: Storage) -> None:
    storage.write("x", b"0123456789")
    buffers = [memoryview(bytearray(length)) for length in (3, 1, 4)]
    with storage.open_range("x", 1, 7) as read:
        assert [read(buffer) for buffer in buffers] == [3, 1, 3]  # of what was asked for no more comes
    assert b"".join(buffers) == b"1234567\0"
    with storage.open_range("x", 6, 100) as read:
        assert [read(buffer) for buffer in buffers] == [3, 1, 0]
    with storage.open_range("x", 0, 10) as read:
        assert read(buffers[0]) == 3  # the rest is given up
    with storage.open_range("gone", 0, 10) as read, pytest.raises(NotFoundError, match="gone"):
        read(buffers[0])


def test_writing_again_replaces(storage: Storage) -> None:
    storage.write("x", b"a long first version")
    storage.write("x", b"short")
    assert storage.read("x") == b"short"


def test_an_empty_object_exists(storage: Storage) -> None:
    storage.write("empty", b"")
    assert storage.exists("empty")
    assert storage.read("empty") == b""


def test_listing_is_recursive_sorted_and_relative(storage: Storage) -> None:
    for key in ("b/2", "a", "b/10", "bb"):
        storage.write(key, key.encode())
    assert storage.list() == [StoredObject(k, len(k)) for k in ("a", "b/10", "b/2", "bb")]
    assert [item.key for item in storage.list("b/")] == ["b/10", "b/2"]
    assert [item.key for item in storage.list("b")] == ["b/10", "b/2", "bb"]
    assert [item.key for item in storage.child("b").list()] == ["10", "2"]
    assert storage.list("nothing") == []
    assert (storage.folders(), storage.child("b").folders()) == (("b",), ())
    assert storage.child("nothing").folders() == ()


def test_delete_and_exists(storage: Storage) -> None:
    assert not storage.exists("x")
    storage.delete("x")
    storage.write("x", b"1")
    assert storage.exists("x")
    storage.delete("x")
    assert not storage.exists("x")


def killed_while_it_writes(folder: Path, key: str) -> None:
    """Let a process die between the creation of a temporary file and its rename."""
    code = (
        "import os, sys; from pathlib import Path; from sharding.storage import LocalStorage\n"
        "Path.write_bytes = lambda self, data: os.kill(os.getpid(), 9)\n"
        "LocalStorage(Path(sys.argv[1])).write(sys.argv[2], b'data')"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder), key], check=False)
    assert ended.returncode == -9
    (left,) = (folder / key).parent.glob(".tmp-*")
    assert left.is_file()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_next_write_into_a_folder_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    killed_while_it_writes(tmp_path, "a/object")
    mine = (".tmp-notes", f".tmp-{'0' * 32}")
    for name in mine:
        (tmp_path / "a" / name).write_text("mine")
    open_storage(tmp_path).write("a/other", b"")
    assert files(tmp_path) == sorted([*mine, "other"])


def test_who_takes_the_lock_removes_what_killed_writers_left_in_any_folder(tmp_path: Path) -> None:
    killed_while_it_writes(tmp_path, "a/b/object")
    storage = LocalStorage(tmp_path)
    with storage._beside("c/object") as living, Lock(storage, "shard"):
        assert not (tmp_path / "a").exists()
        assert living.exists()


def test_a_folder_that_another_process_removes_because_it_is_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = Path.touch, list[Path]()

    def touch(self: Path, *arguments: int, **options: bool) -> None:
        if len(removed) < 3:  # between the making of the folder and that of the file
            self.parent.rmdir()
            removed.append(self.parent)
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "touch", touch)
    storage = open_storage(tmp_path)
    storage.write("a/b/object", b"data")
    assert removed == [tmp_path / "a/b"] * 3
    assert storage.read("a/b/object") == b"data"
    assert storage.create("a/c/object", b"data")


def test_writers_and_removers_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)

    def write_and_delete(number: int) -> None:
        for _ in range(200):
            assert storage.create(f"a/b/{number}", b"data")
            storage.delete(f"a/b/{number}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write_and_delete, range(4)))
    assert storage.list() == []


def test_a_missing_object_is_named(storage: Storage) -> None:
    for read in (lambda: storage.read("no/such"), lambda: storage.read_range("no/such", 0, 1)):
        with pytest.raises(NotFoundError, match="no/such does not exist"):
            read()


def test_a_stream_yields_the_object_in_pieces(storage: Storage) -> None:
    data = bytes(range(256)) * 1000
    storage.write("x", data)
    pieces = list(storage.stream("x"))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) < len(data)
    storage.write("empty", b"")
    assert list(storage.stream("empty")) == []
    with pytest.raises(NotFoundError, match="no/such does not exist"):
        list(storage.stream("no/such"))


def test_only_the_first_creates(storage: Storage) -> None:
    assert storage.create("folder/x", b"first")
    assert not storage.create("folder/x", b"second")
    assert storage.read("folder/x") == b"first"
    assert storage.create("y", b"")
    assert not storage.create("y", b"third")
    assert storage.read("y") == b""
    assert [item.key for item in storage.list()] == ["folder/x", "y"]


def test_of_many_that_create_at_once_one_does(storage: Storage) -> None:
    for key in map(str, range(5)):
        together = threading.Barrier(4)

        def create(content: bytes, key: str = key, together: threading.Barrier = together) -> bool:
            together.wait()
            return storage.create(key, content)

        contents = [bytes([number]) * 50_000 for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            created = list(pool.map(create, contents))
        assert sum(created) == 1
        assert storage.read(key) == contents[created.index(True)]


def test_creating_does_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(tmp_path)
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read("x") == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_upload_stores_a_file(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(bytes(range(256)) * 80_000)  # over 16 MiB, so S3 takes it in parts
    storage.upload("folder/big", path)
    assert storage.read("folder/big") == path.read_bytes()
    storage.write("folder/also", path.read_bytes())
    assert storage.read("folder/also") == path.read_bytes()


def test_a_child_is_the_same_place_under_a_longer_uri(storage: Storage) -> None:
    storage.child("one").child("two").write("x", b"1")
    assert storage.read("one/two/x") == b"1"
    assert storage.child("one/two").uri == f"{storage.uri}/one/two"
    assert open_storage(f"{storage.uri}/one").read("two/x") == b"1"


def test_pickled_copies_and_threads_read_the_same(storage: Storage) -> None:
    storage.write("x", b"1234")
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(copy.read, ["x"] * 40)) == {b"1234"}


def test_a_check_for_writing_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    place = storage.child("none/yet")
    place.check_writable()
    assert storage.list() == []
    assert list(tmp_path.rglob("*")) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"cannot use {tmp_path}/file/out: Not a directory"):
        LocalStorage(tmp_path / "file" / "out").check_writable()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(UserError, match=f"{tmp_path}/link/out does not exist"):
        LocalStorage(tmp_path / "link" / "out").check_writable()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_failed_local_write_leaves_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(NotFoundError, match=r"missing\.bin|x does not exist"):
        storage.upload("x", tmp_path / "missing.bin")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_being_written_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1234").write_bytes(b"half")
    assert open_storage(tmp_path).list() == []


def test_local_keys_stay_below_the_folder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "inside")
    for key in ("../outside", "/etc/passwd", "a/../../b", "a//b", "a\nb", "a\\b"):
        with pytest.raises(UserError, match="is no key"):
            storage.write(key, b"")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://bucket/x", "local path or starts with s3://"),
        ("s3://", "names no bucket"),
        ("s3://user:secret@bucket/x", "only bucket and prefix"),
        ("", "empty URI"),
    ],
)
def test_a_wrong_uri_is_refused_with_advice(uri: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_storage(uri)
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="check the path"):
        open_storage(tmp_path / "file").write("x", b"")


def test_a_full_disk_is_for_the_user_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        open_storage(tmp_path).upload("x", Path(__file__))
    assert type(caught.value) is UserError


@pytest.mark.usefixtures("s3")
class TestS3Refusals:
    """Each is a sentence with advice, and shows neither endpoint nor secret."""

    def test_missing_bucket(self) -> None:
        for use in (
            lambda s: s.read("x"),
            lambda s: s.write("x", b""),
            lambda s: s.list(),
            lambda s: s.delete("x"),
            lambda s: s.check_writable(),
        ):
            with pytest.raises(BucketNotFoundError, match="bucket 'no-such-bucket' does not exist: create it"):
                use(open_storage("s3://no-such-bucket/p"))

    def test_wrong_key_id(self, s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(UserError, match="check AWS_ACCESS_KEY_ID"):
            open_storage("s3://shared/x").read("y")

    def test_wrong_secret(self, s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
        with pytest.raises(UserError, match="check AWS_ACCESS_KEY_ID") as caught:
            open_storage("s3://shared/x").write("y", b"1")
        assert "hush-hush" not in str(caught.value)
        assert type(caught.value) is UserError  # waiting does not mend it

    def test_no_credentials(self, s3: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID"):
            open_storage("s3://shared/x").read("y")

    def test_dead_endpoint(self, s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sharding.storage.retries.FIRST_CONTACT_S", 1.0)
        (port,) = free_ports(1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(StorageUnavailableError, match="endpoint does not answer") as caught:
            open_storage("s3://shared/x").read("y")
        assert str(port) not in str(caught.value)
        assert caught.value.__suppress_context__  # a traceback would print the endpoint

    def test_malformed_endpoint(self, s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
        with pytest.raises(UserError, match="AWS_ENDPOINT_URL is no valid"):
            open_storage("s3://shared/x").read("y")

    def test_bad_bucket_name(self) -> None:
        with pytest.raises(UserError, match="no valid S3 URI"):
            open_storage("s3://Not A Bucket/x").read("y")


Answer = Callable[[BaseHTTPRequestHandler], None]


def error(status: int, code: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        send(request, status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    return answer


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, length: int | None = None) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    request.wfile.write(body)


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Run a server that answers every GET in the same way; give its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Storage]:
    """Return a function that opens a bucket at an endpoint, with any keys and little patience."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    for name in ("FIRST_CONTACT_S", "KNOWN_S"):
        monkeypatch.setattr(f"sharding.storage.retries.{name}", 0.2)

    def opened(url: str) -> Storage:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        return open_storage("s3://bucket")

    return opened


def test_a_server_that_stays_silent_is_asked_twice(
    endpoint: Callable[[str], Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.storage.s3.client.READ_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        storage = endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StorageUnavailableError, match="endpoint does not answer"):
            storage.read("x")
        server.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                server.accept()[0].close()
                asked += 1
    assert asked == 2


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (503, "SlowDown", StorageUnavailableError, "cannot serve s3://bucket/x now .SlowDown.: try again later"),
        (500, "InternalError", StorageUnavailableError, "InternalError"),
        (403, "AccessDenied", UserError, "is denied"),
        (403, "InvalidAccessKeyId", UserError, "check AWS_ACCESS_KEY_ID"),
        (400, "InvalidRequest", UserError, "check the URI"),
    ],
)
def test_only_what_may_pass_counts_as_unavailable(
    endpoint: Callable[[str], Storage], status: int, code: str, kind: type[UserError], words: str
) -> None:
    with serving(error(status, code)) as url, pytest.raises(UserError, match=words) as caught:
        endpoint(url).read("x")
    assert type(caught.value) is kind


def test_a_body_that_breaks_off_is_fetched_again_where_the_server_names_no_version(
    endpoint: Callable[[str], Storage],
) -> None:
    lengths = iter([10, 4])
    with serving(lambda request: send(request, 200, b"1234", next(lengths))) as url:
        assert endpoint(url).read("x") == b"1234"
    with (
        serving(lambda request: send(request, 200, b"1234", 10)) as url,
        pytest.raises(StorageUnavailableError, match="s3://bucket/x breaks off"),
    ):
        endpoint(url).read("x")


def test_a_server_that_knows_no_ranges_is_refused(endpoint: Callable[[str], Storage]) -> None:
    with (
        serving(lambda request: send(request, 200, b"0123456789")) as url,
        pytest.raises(UserError, match="it must support byte ranges"),
    ):
        endpoint(url).read_range("x", 3, 4)


def test_a_page_of_another_server_is_no_listing(endpoint: Callable[[str], Storage]) -> None:
    with (
        serving(lambda request: send(request, 200, b"<html><p>It works!</html>")) as url,
        pytest.raises(StorageUnavailableError, match="cannot serve s3://bucket now"),
    ):
        endpoint(url).list()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write("folder/file", b"1")
    scandir = os.scandir

    def fail(path: str) -> object:
        if str(path).endswith("folder"):
            raise OSError(errno.EIO, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UserError, match="Input/output error"):
        storage.list()
