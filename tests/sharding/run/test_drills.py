"""What interrupts, doubles, slows and damages a sharding, and that the dataset comes out the same."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sharding.format.index import INDEX_NAME, Index, damage_of
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import Report, shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.run.prune import prune
from sharding.run.verify import verify
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import CorruptedError, Storage, open_storage, retries
from sharding.storage.lock import LOCK_FOLDER
from sharding.storage.s3 import store
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request
from tests.sharding.archives import pack
from tests.sharding.conftest import World, digests, generation
from tests.uploads import HeldUploads, begin_upload, unfinished

OPTIONS = ShardOptions(SampleOptions(revisits=2), PlanOptions(shard_bytes=2_500_000))
"""A sample takes 2.4 MB, so a shard has one."""
COMMAND = ["--revisits", "2", "--shard-size", "2.5"]


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twelve AOIs of few pixels."""
    folder = tmp_path_factory.mktemp("many")
    return World(folder, write_worldstrat(folder, 12, seed=6, revisits=2, hr_side=80))


@pytest.fixture(scope="session")
def undisturbed(many: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of all that a run leaves which nothing disturbs."""
    storage = open_storage(tmp_path_factory.mktemp("undisturbed"))
    assert shard_folder(many.folder, storage, OPTIONS).shards == {"made": 12}
    return digests(storage)


def start(
    many: World, output: str, workers: int = 1, more: Sequence[str] = (), **options: object
) -> subprocess.Popen[str]:
    """Start the real command in a process group of its own."""
    command = [sys.executable, "-m", "cluster.cli", "shard", "--input", str(many.folder), "--output", output]
    command += [*COMMAND, "--workers", str(workers), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environment", {})}  # type: ignore[dict-item]
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
        **options,  # type: ignore[call-overload]
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return str(output)


@pytest.mark.parametrize("workers", [1, 2])
def test_zips_give_the_folders_bytes(many: World, undisturbed: dict[str, str], tmp_path: Path, workers: int) -> None:
    zips = pack(many.folder, tmp_path / "zips")
    shard_folder(zips, open_storage(tmp_path / "out"), OPTIONS, workers)
    assert digests(open_storage(tmp_path / "out")) == undisturbed


def files(folder: Path) -> set[Path]:
    return set(folder.glob("plan-*/*"))


def kill_at(process: subprocess.Popen[str], folder: Path, moment: float) -> None:
    """Kill a run some share of a shard's time after its next file has appeared, in the midst of its work."""
    before = files(folder)
    deadline = time.monotonic() + 400
    while process.poll() is None and files(folder) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):  # on a busy machine it may have come to its end meanwhile
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def drill(many: World, folder: Path, kills: int, undisturbed: dict[str, str]) -> None:
    draw = random.Random(kills)
    for _ in range(kills):
        kill_at(start(many, str(folder)), folder, draw.uniform(0, 0.1))
        if (folder / INDEX_NAME).exists():  # the last of all: that run was through
            break
        found = digests(open_storage(folder))
        assert {key: digest for key, digest in found.items() if not key.startswith(LOCK_FOLDER)}.items() <= (
            undisturbed.items()
        )
    output = finished(start(many, str(folder)))
    assert digests(open_storage(folder)) == undisturbed
    kept = re.search(r"(\d+) kept", output)
    assert kept
    assert int(kept[1]) >= 1


def test_a_killed_run_goes_on(many: World, undisturbed: dict[str, str], tmp_path: Path) -> None:
    drill(many, tmp_path / "out", 2, undisturbed)


@pytest.mark.slow
def test_ten_kills_leave_the_same_bytes(many: World, undisturbed: dict[str, str], tmp_path: Path) -> None:
    drill(many, tmp_path / "out", 10, undisturbed)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_dataset_that_is_read_survives_kills_of_another_plan_over_it(
    many: World, undisturbed: dict[str, str], tmp_path: Path, kills: int
) -> None:
    folder = tmp_path / "out"
    storage = open_storage(folder)
    first = shard_folder(many.folder, storage, OPTIONS).index
    another, draw = first, random.Random(7)
    for number in range(kills):
        process = start(many, str(folder), more=["--overwrite", "--revisits", "1", "--seed", str(number)])
        kill_at(process, folder, draw.uniform(0, 0.6))
        published = Index.load(storage)
        assert published.digest == another.digest or published.split_seed == number
        assert verify(storage, deep=True).problems == ()
        another = published
        for shard in itertools.chain.from_iterable(first.splits.values()):
            assert damage_of(storage, shard) is None
    finished(start(many, str(folder), more=["--overwrite", "--prune"]))
    assert digests(storage) == undisturbed


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_two_plans_at_once_one_whole_dataset_remains(
    many: World, tmp_path: Path, request: pytest.FixtureRequest, place: str, rounds: int
) -> None:
    for number in range(rounds):
        uri = str(tmp_path / str(number)) if place == "local" else request.getfixturevalue("s3").prefix()
        both = [start(many, uri, more=["--seed", seed]) for seed in ("1", "2")]
        ended = [(process.communicate(timeout=500)[0], process.returncode) for process in both]
        assert sorted(status for _, status in ended) == [0, 2], ended
        refusal = next(output for output, status in ended if status == 2)
        assert re.search("is being written by `satfusion shard` of|holds another dataset|others try to", refusal)
        assert verify(open_storage(uri), deep=True).problems == ()


def test_a_command_that_is_killed_takes_its_workers_along(many: World, s3: S3) -> None:
    """They would wait for tasks for ever."""
    killed = threading.Event()

    def hold(request: Request) -> Faults:
        """Let no shard be stored before the kill."""
        if request.method == "PUT" and ".tar" in request.path:
            killed.wait()
        return Faults()

    def wait_for(processes: Callable[[int], bool]) -> None:
        deadline = time.monotonic() + 400
        while not processes(len(of_group(process.pid))):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        proxy.faults = hold
        process = start(many, s3.prefix(), workers=2, environment={"AWS_ENDPOINT_URL": proxy.url})
        try:
            # The command, Python's tracker of resources, the process that workers are forked from, two of these.
            wait_for(lambda count: count >= 5)
            process.kill()
            process.wait()
            wait_for(lambda count: count == 0)
        finally:
            killed.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.parametrize("when", [".lock/*.json", "plan-*/*.tar"])
def test_ctrl_c_in_a_terminal_shows_no_trace_of_the_workers(many: World, tmp_path: Path, when: str) -> None:
    """It reaches the command, its workers and the process that they are forked from, which may load still."""
    process = start(many, str(tmp_path / "out"), workers=3)
    while process.poll() is None and not list((tmp_path / "out").glob(when)):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # on a busy machine it may have ended
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=500)
    assert "Traceback" not in output
    if output.endswith("satfusion: interrupted\n"):
        assert process.returncode == 130
    else:  # it was through; Python itself takes the signal in its very last moments
        assert process.returncode in {0, -signal.SIGINT}, output
        assert verify(open_storage(tmp_path / "out"), deep=True).problems == ()


def test_parts_of_a_killed_upload_are_removed_after_an_hour(
    many: World, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = HeldUploads()
    uri = s3.prefix()
    storage = open_storage(uri)
    more = ["--shard-size", "8", "--part-size", "5"]
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        proxy.faults = uploads
        process = start(many, uri, more=more, environment={"AWS_ENDPOINT_URL": proxy.url})
        try:
            assert uploads.held.wait(400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            uploads.released.set()
            process.communicate()
    (left,) = unfinished(s3, storage)
    assert re.fullmatch(r"plan-[0-9a-f]{16}/[a-z]+-0000[0-9]\.tar", left)
    begin_upload(s3, storage, "train-00000.tar")  # a name of ours where only others would begin one
    assert "removed the parts" not in finished(start(many, uri, more=more))
    begin_upload(s3, storage, INDEX_NAME)
    young = unfinished(s3, storage)
    assert sorted(young) == sorted([left, "train-00000.tar", INDEX_NAME])
    assert not any("unfinished upload" in line for line in prune(storage).lines())
    monkeypatch.setattr(store, "ABANDONED_S", -60.0)  # as after an hour
    removed = [f"removed the parts of an unfinished upload of {key}" for key in (INDEX_NAME, left)]
    assert list(prune(storage).lines()) == removed
    assert unfinished(s3, storage) == ["train-00000.tar"]
    assert verify(storage, deep=True).problems == ()


def of_group(group: int) -> list[int]:
    """Return the living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_of_two_at_once_one_is_refused_or_comes_later(many: World, undisturbed: dict[str, str], tmp_path: Path) -> None:
    both = [start(many, str(tmp_path / "out")) for _ in range(2)]
    ended = [(process.communicate(timeout=500)[0], process.returncode) for process in both]
    assert digests(open_storage(tmp_path / "out")) == undisturbed
    assert 0 in {status for _, status in ended}
    for output, status in ended:
        if status == 0:
            assert sum(int(count) for count in re.findall(r"(\d+) (?:made|kept)", output)) == 12
        else:
            assert (status, "is being written by `satfusion shard` of" in output) == (2, True)
    assert verify(open_storage(tmp_path / "out"), deep=True, folder=many.folder).problems == ()


def test_a_full_staging_folder_is_a_sentence_and_costs_nothing(
    many: World, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    limit = 1_000_000  # of any file: less than a shard

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(many, str(tmp_path / "out"), preexec_fn=small_files)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 2
    assert re.search(r"satfusion: error: cannot write a shard in \S+ \(File too large\): free some space there", output)
    assert "Traceback" not in output
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    finished(start(many, str(tmp_path / "out")))
    assert digests(open_storage(tmp_path / "out")) == undisturbed


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(busy=0.3), id="busy", marks=pytest.mark.slow),
        pytest.param(Faults(cut=0.2, stall=0.05, lose=0.1, reset=0.1), id="broken"),
    ],
)
def test_a_bad_store_costs_nothing(
    many: World, undisturbed: dict[str, str], s3: S3, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    direct = open_storage(s3.prefix())
    direct.exists("x")  # it keeps the endpoint of its first request
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"], seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.2)
        monkeypatch.setattr("sharding.storage.s3.client.READ_TIMEOUT_S", 1)
        proxy.faults = faults
        shard_folder(many.folder, open_storage(direct.uri), OPTIONS)
        assert digests(direct) == undisturbed
        direct.delete(INDEX_NAME)
        assert shard_folder(many.folder, open_storage(direct.uri), OPTIONS).shards == {"kept": 12}
    assert digests(direct) == undisturbed


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


Place = Callable[[Index, Path], int]
REGIONS: dict[str, Place] = {
    "header": lambda index, path: index.splits["train"][0].samples[0].offset + 3,
    "payload": lambda index, path: sum(index.splits["train"][0].samples[0].members["lr.npy"]) - 9,
    "padding": lambda index, path: sum(index.splits["train"][0].samples[0].members["json"]) + 1,
    "end": lambda index, path: path.stat().st_size - 1,
}


@pytest.fixture
def copy(many: World, tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "out")
    shard_folder(many.folder, storage, OPTIONS)
    return storage


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_byte_is_found_and_repaired(
    many: World, undisturbed: dict[str, str], copy: Storage, region: str
) -> None:
    folder = Path(copy.uri)
    index = Index.load(copy)
    broken = index.splits["train"][0]
    assert verify(copy, deep=True, folder=many.folder).problems == ()
    flip(folder / broken.name, REGIONS[region](index, folder / broken.name))
    problems = verify(copy).problems
    assert {problem.shard for problem in problems} == {broken.name}
    if region != "end":  # which belongs to no sample
        assert broken.samples[0].aoi in problems[-1].detail
    times = {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("plan-*/*.tar")}
    report = shard_folder(many.folder, copy, OPTIONS)
    assert report.shards == {"repaired": 1, "kept": 11}
    assert digests(copy) == undisturbed
    again = {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("plan-*/*.tar")}
    assert {name for name in times if times[name] != again[name]} == {broken.name}
    assert verify(copy, deep=True).problems == ()


def test_what_the_store_finds_corrupt_is_repaired(
    many: World, undisturbed: dict[str, str], copy: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an S3 store says it, whose own checksum fails in the last piece."""
    broken, stream = "train-00002.tar", type(copy).stream
    listed = generation(copy) + broken

    def corrupt(storage: Storage, key: str) -> Iterator[bytes]:
        yield from stream(storage, key)  # type: ignore[arg-type]
        if key.endswith(broken):
            raise CorruptedError("does not match")

    monkeypatch.setattr(type(copy), "stream", corrupt)
    assert [problem.shard for problem in verify(copy).problems] == [listed]
    assert shard_folder(many.folder, copy, OPTIONS).shards == {"repaired": 1, "kept": 11}
    assert digests(copy) == undisturbed


def spoil_sidecar(folder: Path) -> None:
    next(folder.glob("plan-*/train-00001.tar.json")).write_text('{"fingerprint": 1}')


def cut_shard(folder: Path) -> None:
    os.truncate(next(folder.glob("plan-*/val-00000.tar")), 1000)


def remove_shard(folder: Path) -> None:
    next(folder.glob("plan-*/test-00000.tar")).unlink()


def spoil_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{")


@pytest.mark.parametrize("damage", [spoil_sidecar, cut_shard, remove_shard, spoil_index])
def test_a_damaged_dataset_is_repaired(
    many: World, undisturbed: dict[str, str], copy: Storage, damage: Callable[[Path], None]
) -> None:
    damage(Path(copy.uri))
    report: Report = shard_folder(many.folder, copy, OPTIONS)
    assert report.shards.get("kept", 0) >= 11
    assert digests(copy) == undisturbed


def test_verify_sees_a_source_that_changed(many: World, copy: Storage, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_worldstrat(other, 12, seed=7, revisits=2, hr_side=80)
    found = verify(copy, deep=True, folder=other, num_aois=3)
    assert len(found.prepared) == 3
    assert {problem.detail.split("'")[1] for problem in found.problems} == set(found.prepared)
