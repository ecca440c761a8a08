"""Scratch folders: removed at the end, and by the next start if their process was killed."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sharding.errors import UserError
from sharding.scratch import ScratchFolder, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


OWN = "folder = ScratchFolder('test').path"
PYTHONS = "mark_python_folder(); mark_python_folder(); folder = Path(multiprocessing.util.get_temp_dir())"


def killed(temporary: Path, make: str) -> Path:
    """Return the folder that a process made, which was killed then."""
    program = (
        "import multiprocessing.util, tempfile; from pathlib import Path\n"
        "from sharding.scratch import ScratchFolder, mark_python_folder\n"
        f"tempfile.tempdir = {str(temporary)!r}; {make}; (folder / 'file').touch()\n"
        "print(folder, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder / "file").exists()
        with ScratchFolder("other"):  # another start, while the process runs
            assert (folder / "file").exists()
        process.send_signal(signal.SIGKILL)
    assert (folder / "file").exists()
    return folder


def test_a_folder_is_empty_and_ends_with_its_block(temporary: Path) -> None:
    with scratch_folder("test") as folder:
        assert folder.is_relative_to(temporary)
        assert list(folder.iterdir()) == []
        (folder / "a").mkdir()
        with scratch_folder("test") as another:
            assert another != folder
        assert (folder / "a").exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("make", [OWN, PYTHONS])
def test_the_next_start_removes_what_a_killed_process_left(temporary: Path, make: str) -> None:
    folder = killed(temporary, make)
    with scratch_folder("test"):
        assert not folder.exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("make", [OWN, PYTHONS])
def test_another_machines_folder_stays_though_its_lock_looks_free(
    temporary: Path, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared file system whose locks hold on one machine only, where its process may run."""
    folder = killed(temporary, f"import socket; socket.gethostname = lambda: 'node[1]'; {make}")
    with scratch_folder("test"):
        assert (folder / "file").exists()
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    with scratch_folder("test"):
        assert (folder / "file").exists()
    monkeypatch.setattr(socket, "gethostname", lambda: "node[1]")
    with scratch_folder("test"):
        assert not folder.exists()
    assert list(temporary.iterdir()) == []


def test_what_is_not_ours_stays(temporary: Path) -> None:
    lock = f"satfusion-{socket.gethostname()}.lock"
    (temporary / "satfusion-notes").mkdir()
    (temporary / "satfusion-notes" / "file").write_text("mine")
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / lock).write_text("")
    (temporary / "satfusion-link").symlink_to(temporary / "elsewhere")
    (temporary / "pymp-other").mkdir()
    with scratch_folder("test"):
        pass
    assert (temporary / "satfusion-notes" / "file").read_text() == "mine"
    assert (temporary / "elsewhere" / lock).exists()
    assert (temporary / "pymp-other").exists()


def test_a_temporary_folder_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(UserError, match="set TMPDIR to a folder"):
        ScratchFolder("test")
