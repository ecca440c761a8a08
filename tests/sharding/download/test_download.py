"""Downloads from a real server that fails in every way that we know."""

from __future__ import annotations

import base64
import email.utils
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.local.processes import free_ports
from sharding.download import fetch
from sharding.download.worldstrat import DEFAULT_KEYS, WORLDSTRAT, ZENODO, Published, download
from sharding.errors import UserError
from sharding.storage import retries
from tests.sharding.mirror import Fault, Mirror, serving

TRIES = 5
NAME = WORLDSTRAT["hr"].name
BODY = random.Random(1).randbytes(3_000_000)
FAST_SERVER_S = 120.0


def table(*bodies: bytes) -> dict[str, Published]:
    """Return a table of files like the published one: ``hr`` holds the first body, ``l2a`` the second, and so on."""
    return {
        key: Published(WORLDSTRAT[key].name, hashlib.sha256(body).hexdigest(), 0)
        for key, body in zip(("hr", "l2a", "l1c", "metadata", "split"), bodies, strict=False)
    }


def get(mirror: Mirror, folder: Path, body: bytes = BODY) -> None:
    """Download ``hr``, of which the published content is ``body``."""
    download(folder, ["hr"], mirror=mirror.url, published=table(body), say=lambda _: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries end after ``TRIES`` failures in a row, without pauses."""
    monkeypatch.setattr(fetch, "TIMEOUT_S", FAST_SERVER_S)
    monkeypatch.setattr(retries, "LEAST_ATTEMPTS", TRIES)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.0)
    monkeypatch.setattr(fetch, "KNOWN_S", 0.0)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with serving(Mirror({NAME: BODY})) as running:
        running.etags[NAME] = '"one"'
        yield running


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts by the true policy; they take no time but that of its clock."""
    slept: list[float] = []
    event = SimpleNamespace(is_set=lambda: False, wait=slept.append)
    monkeypatch.setattr(retries, "GIVE_UP", event)
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: sum(slept)))
    monkeypatch.setattr(retries, "LEAST_ATTEMPTS", 2)
    monkeypatch.setattr(fetch, "KNOWN_S", 300.0)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 10.0)
    return slept


def begun(mirror: Mirror, folder: Path, length: int = 1_000_000) -> Path:
    """Leave a part of ``length`` bytes behind, as an interrupted download does, and return its path."""
    mirror.faults.extend([Fault(after=length), *[Fault(status=503)] * (TRIES - 1)])
    with pytest.raises(UserError, match=f"it resumes from byte {length}"):
        get(mirror, folder)
    mirror.requests.clear()
    part = folder / f"{NAME}.part"
    assert part.read_bytes() == BODY[:length]
    return part


def only(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_default_leaves_l1c_out_and_is_not_fetched_again(tmp_path: Path) -> None:
    bodies = [BODY, b"l2a" * 99, b"l1c" * 99, b"", b"name,split\n"]
    published = table(*bodies)
    said: list[str] = []
    with serving(Mirror({file.name: body for file, body in zip(published.values(), bodies, strict=True)})) as mirror:
        for _ in range(2):
            download(tmp_path / "new", DEFAULT_KEYS, mirror=mirror.url + "/", published=published, say=said.append)
        names = {published[key].name for key in DEFAULT_KEYS}
        assert sorted(request.path for request in mirror.requests) == sorted(f"/{name}" for name in names)
        assert all("satfusion" in (request.agent or "") for request in mirror.requests)
    assert only(tmp_path / "new") == names | {f"{name}.verified" for name in names}
    assert (tmp_path / "new" / NAME).read_bytes() == BODY
    assert [("fetched" in line, "already there" in line) for line in said] == [(True, False)] * 4 + [(False, True)] * 4


def test_a_file_from_elsewhere_is_read_once_and_believed_by_its_digest_alone(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / NAME
    target.write_bytes(BODY)
    get(mirror, tmp_path)
    assert mirror.requests == []
    with monkeypatch.context() as patch:
        patch.setattr("sharding.download.worldstrat.hash_file", None)  # its digest is known now
        get(mirror, tmp_path)
    target.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(UserError, match=r"hr_dataset\.zip is not the published file .* move it away"):
        get(mirror, tmp_path)
    assert target.exists()


def test_killed_midway_only_the_rest_is_fetched(mirror: Mirror, tmp_path: Path) -> None:
    body = random.Random(2).randbytes(24_000_000)
    mirror.files[NAME] = body
    script = (
        "import sys; from pathlib import Path; from sharding.download.worldstrat import *\n"
        "published = {'hr': Published(sys.argv[3], sys.argv[4], 0)}\n"
        "download(Path(sys.argv[1]), ['hr'], mirror=sys.argv[2], published=published)"
    )
    arguments = [str(tmp_path), mirror.url, NAME, hashlib.sha256(body).hexdigest()]
    part = tmp_path / f"{NAME}.part"
    for least in (5_000_000, 12_000_000):
        mirror.faults.extend([Fault(after=8_000_000, how="stall")] * 9)
        process = subprocess.Popen([sys.executable, "-c", script, *arguments])
        deadline = time.monotonic() + 400
        while not (part.exists() and part.stat().st_size > least) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / NAME).exists()
        mirror.faults.clear()
    here = part.stat().st_size
    assert 12_000_000 < here < len(body)
    mirror.requests.clear()
    get(mirror, tmp_path, body)
    assert (tmp_path / NAME).read_bytes() == body
    (request,) = mirror.requests
    assert (request.range, request.if_range, request.status) == (f"bytes={here}-", '"one"', 206)
    assert request.sent == len(body) - here
    assert only(tmp_path) == {NAME, f"{NAME}.verified"}


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_bodies_that_break_off_anywhere_are_continued(
    how: str, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PROGRESS_BYTES", 1)
    choose = random.Random(how)
    mirror.faults.extend(Fault(after=choose.randrange(300_000), how=how) for _ in range(12))
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert len(mirror.requests) == 13 > TRIES
    starts = [int((asked or "bytes=0-")[6:-1]) for asked in mirror.ranges_asked()]
    assert starts == sorted(starts)
    if how == "cut":  # what a reset throws away has to be sent again
        assert mirror.sent == len(BODY)


def test_a_stalled_body_is_left_and_continued(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 3.0)
    mirror.faults.append(Fault(after=500_000, how="stall"))
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert mirror.ranges_asked() == [None, "bytes=500000-"]


def test_busy_answers_are_waited_for_as_long_as_they_ask(mirror: Mirror, tmp_path: Path, pauses: list[float]) -> None:
    later = email.utils.formatdate(time.time() + 550, usegmt=True)
    for asked in ("7", later, "86400", "soon"):
        mirror.faults.append(Fault(status=503 if asked != "soon" else 429, headers={"Retry-After": asked}))
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert pauses[0] == 7
    assert 430 < pauses[1] <= 550
    assert pauses[2] == retries.LONGEST_ASKED_S == 600
    assert pauses[3] <= retries.LONGEST_PAUSE_S


def test_pauses_grow_and_end(mirror: Mirror, tmp_path: Path, pauses: list[float]) -> None:
    mirror.faults.extend([Fault(status=500)] * 999)
    with pytest.raises(UserError, match=r"HTTP 500, .* times in a row; check the network, then run the same") as caught:
        get(mirror, tmp_path)
    assert f"HTTP 500, {len(mirror.requests)} times in a row" in str(caught.value)
    assert sum(pauses) == pytest.approx(300)
    assert len(mirror.requests) == len(pauses) + 1
    assert 40 < len(pauses) < 200
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4] + [8.0] * (len(pauses) - 7)
    assert all(0 <= slept <= most for slept, most in zip(pauses, longest, strict=True))
    assert max(pauses) > 6


def test_pauses_that_a_server_asks_for_end_too(mirror: Mirror, tmp_path: Path, pauses: list[float]) -> None:
    mirror.faults.extend([Fault(status=503, headers={"Retry-After": "60"})] * 99)
    with pytest.raises(UserError, match="HTTP 503, 11 times in a row"):
        get(mirror, tmp_path)
    assert pauses == [60] * 10


def test_a_server_that_never_answered_is_given_up_sooner(tmp_path: Path, pauses: list[float]) -> None:
    gone = Mirror({})
    gone.url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(UserError, match=r"failed \(Connection refused\), .* check the network and --mirror"):
        get(gone, tmp_path)
    assert sum(pauses) == pytest.approx(retries.FIRST_CONTACT_S)
    assert len(pauses) >= 1


def test_progress_resets_the_count_of_failures(mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults.extend([Fault(status=503)] * 4 + [Fault(after=fetch.PROGRESS_BYTES)] + [Fault(status=503)] * 3)
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert len(mirror.requests) == 9
    assert len(mirror.requests) - 1 > TRIES


def test_a_server_without_ranges_starts_from_byte_0_and_not_for_ever(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges = False
    mirror.faults.append(Fault(after=2_000_000))
    get(mirror, tmp_path / "once")
    assert (tmp_path / "once" / NAME).read_bytes() == BODY
    assert [request.status for request in mirror.requests] == [200, 200]
    mirror.requests.clear()
    mirror.faults.extend([Fault(after=2_000_000)] * 99)
    with pytest.raises(UserError, match="the response ended early, 5 times in a row"):
        get(mirror, tmp_path / "always")
    assert len(mirror.requests) <= TRIES + 1


@pytest.mark.parametrize(("etag", "check"), [('"two"', True), ('"two"', False), ('W/"two"', False)])
def test_another_version_is_fetched_from_byte_0(etag: str, check: bool, mirror: Mirror, tmp_path: Path) -> None:
    """Whether the server heeds If-Range or not."""
    begun(mirror, tmp_path)
    new = BODY[::-1]
    mirror.files[NAME], mirror.etags[NAME], mirror.check_if_range = new, etag, check
    get(mirror, tmp_path, new)
    assert (tmp_path / NAME).read_bytes() == new
    assert mirror.requests[0].if_range == '"one"'


def test_a_weak_etag_is_compared_and_never_sent(mirror: Mirror, tmp_path: Path) -> None:
    mirror.etags[NAME] = 'W/"one"'
    begun(mirror, tmp_path)
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert [(request.range, request.if_range) for request in mirror.requests] == [("bytes=1000000-", None)]


def test_another_length_is_told_and_the_part_stays(mirror: Mirror, tmp_path: Path) -> None:
    part = begun(mirror, tmp_path)
    mirror.files[NAME], mirror.etags[NAME] = b"<html>please log in</html>", '"two"'
    with pytest.raises(UserError, match=r"has 26 bytes now, and .*part is part of one of 3000000: .* remove the part"):
        get(mirror, tmp_path)
    mirror.etags[NAME] = '"one"'
    with pytest.raises(UserError, match="HTTP 416"):
        get(mirror, tmp_path)
    assert part.read_bytes() == BODY[:1_000_000]


def test_wrong_bytes_never_look_whole(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files[NAME] = BODY[:-1] + b"!"
    with pytest.raises(UserError, match=f"instead of {hashlib.sha256(BODY).hexdigest()}: it was removed"):
        get(mirror, tmp_path)
    assert only(tmp_path) == set()


def test_a_damaged_part_is_found(mirror: Mirror, tmp_path: Path) -> None:
    part = begun(mirror, tmp_path)
    part.write_bytes(b"!" + BODY[1:1_000_000])
    with pytest.raises(UserError, match="it was removed"):
        get(mirror, tmp_path)
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_part_of_nothing_known_is_refused_and_stays(mirror: Mirror, tmp_path: Path) -> None:
    part = tmp_path / f"{NAME}.part"
    part.write_bytes(b"!" * 10_000)
    with pytest.raises(UserError, match=r"\.part holds 10000 bytes that nothing says are of this download"):
        get(mirror, tmp_path)
    assert part.read_bytes() == b"!" * 10_000
    part.unlink()
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert mirror.ranges_asked() == [None]


def test_a_whole_part_needs_no_request(mirror: Mirror, tmp_path: Path) -> None:
    part = begun(mirror, tmp_path)
    part.write_bytes(BODY)
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert mirror.requests == []


def test_a_mirror_resumes_where_another_ended(mirror: Mirror, tmp_path: Path) -> None:
    begun(mirror, tmp_path)
    with serving(Mirror({NAME: BODY})) as other:
        other.etags[NAME] = '"elsewhere"'
        other.faults.append(Fault(after=1_000_000))
        get(other, tmp_path)
        assert [(request.range, request.if_range) for request in other.requests] == [
            ("bytes=1000000-", None),
            ("bytes=2000000-", '"elsewhere"'),
        ]
    assert (tmp_path / NAME).read_bytes() == BODY


def test_the_second_of_two_says_so(mirror: Mirror, tmp_path: Path) -> None:
    mirror.gate.clear()
    first = threading.Thread(target=get, args=(mirror, tmp_path))
    first.start()
    try:
        while not mirror.requests:
            time.sleep(0.01)
        with pytest.raises(UserError, match="another download is writing"):
            get(mirror, tmp_path)
    finally:
        mirror.gate.set()
        first.join()
    assert (tmp_path / NAME).read_bytes() == BODY
    assert len(mirror.requests) == 1


def test_a_file_system_without_locks_is_used_with_a_warning(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("sharding.download.fetch.fcntl.flock", none)
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert "has no locks" in caplog.text


def test_without_a_mirror_it_is_zenodo(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ZENODO == "https://zenodo.org/records/15382551/files"
    monkeypatch.setattr("sharding.download.worldstrat.ZENODO", mirror.url)
    download(tmp_path, ["hr"], published=table(BODY))
    assert [request.path for request in mirror.requests] == [f"/{NAME}?download=1"]


def test_no_room_is_told_ahead(mirror: Mirror, tmp_path: Path) -> None:
    published = {"hr": Published(NAME, hashlib.sha256(BODY).hexdigest(), 10**9)}
    with pytest.raises(UserError, match="need about 1000000000 GB more"):
        download(tmp_path, ["hr"], mirror=mirror.url, published=published)
    assert mirror.requests == []
    mirror.lengths[NAME] = str(10**18)
    with pytest.raises(UserError, match=r"hr_dataset\.zip needs 1000000000\.0 GB more"):
        get(mirror, tmp_path)
    mirror.lengths[NAME] = None
    with pytest.raises(UserError, match="does not say how long"):
        get(mirror, tmp_path)


def test_a_full_disk_keeps_the_part(mirror: Mirror, tmp_path: Path) -> None:
    """The kernel refuses to let the file grow; it does so for a full disk too, under another number."""
    script = (
        "import resource, sys; from pathlib import Path; from sharding.download.worldstrat import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "published = {'hr': Published(sys.argv[3], '0' * 64, 0)}\n"
        "download(Path(sys.argv[1]), ['hr'], mirror=sys.argv[2], published=published)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), mirror.url, NAME]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("sharding.errors.UserError: no space left for"), ended.stderr
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[:2_000_000]
    get(mirror, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert mirror.ranges_asked() == [None, "bytes=2000000-"]


def test_redirects_are_followed_with_the_range(mirror: Mirror, tmp_path: Path) -> None:
    begun(mirror, tmp_path)
    with serving(Mirror({})) as front:
        front.faults.append(Fault(status=302, headers={"Location": f"{mirror.url}/{NAME}?download=1"}))
        get(front, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert [(request.path, request.range) for request in mirror.requests] == [(f"/{NAME}?download=1", "bytes=1000000-")]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("ftp://127.0.0.1/x", "redirects from http to a URL that is not http or https"),
        ("file:///etc/passwd", "redirects from http to a URL that is not http or https"),
    ],
)
def test_redirects_out_of_http_are_refused(location: str, words: str, mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults.append(Fault(status=302, headers={"Location": location}))
    with pytest.raises(UserError, match=words):
        get(mirror, tmp_path)
    assert not (tmp_path / NAME).exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_is_verified_and_never_left(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    where = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{pem}.key", "-out", f"{pem}.crt"]
    subprocess.run([*make, *where], check=True, capture_output=True)
    pem.write_text(Path(f"{pem}.key").read_text() + Path(f"{pem}.crt").read_text())
    with serving(Mirror({NAME: BODY}), certificate=pem) as secure:
        with pytest.raises(UserError, match="certificate of the mirror cannot be trusted"):
            get(secure, tmp_path / "to")
        assert secure.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", f"{pem}.crt")
        secure.faults.append(Fault(status=302, headers={"Location": f"{mirror.url}/{NAME}"}))
        with pytest.raises(UserError, match="redirects from https to a URL that is not https"):
            get(secure, tmp_path / "to")
        assert mirror.requests == []
        get(secure, tmp_path / "to")
    assert (tmp_path / "to" / NAME).read_bytes() == BODY


def test_a_proxy_of_the_environment_is_used_with_its_login(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror stands in for the proxy, which is asked for whole URLs."""
    url = f"http://data.invalid/{NAME}"
    mirror.files[url] = mirror.files.pop(NAME)
    monkeypatch.setenv("http_proxy", mirror.url.replace("//", "//me:hu%40sh@"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    download(tmp_path, ["hr"], mirror="http://data.invalid", published=table(BODY))
    assert (tmp_path / NAME).read_bytes() == BODY
    (request,) = mirror.requests
    assert request.path == url
    assert request.login == f"Basic {base64.b64encode(b'me:hu@sh').decode()}"
    monkeypatch.setenv("no_proxy", "data.invalid")
    with pytest.raises(UserError, match="the connection to the mirror failed"):
        download(tmp_path / "direct", ["hr"], mirror="http://data.invalid", published=table(BODY))
    assert len(mirror.requests) == 1


def test_too_many_redirects_are_refused(mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults.extend([Fault(status=302, headers={"Location": f"/{NAME}"})] * 99)
    with pytest.raises(UserError, match="HTTP 302"):
        get(mirror, tmp_path)
    assert len(mirror.requests) == 10


def test_what_the_server_refuses_is_not_asked_twice(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files.clear()
    with pytest.raises(UserError, match=r"the mirror refuses hr_dataset\.zip \(HTTP 404\)"):
        get(mirror, tmp_path)
    assert len(mirror.requests) == 1
