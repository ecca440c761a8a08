"""Another user of this machine, who knows all addresses and has no token."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

NOBODY = 65534
RIGHTS = "+dac_read_search"
"""It lets the other user read this Python wherever it is installed; no service looks at it."""


def as_stranger(arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments as another user, who inherits no variable; skip the test if that is impossible."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.getuid() != 0:
        pytest.skip("only root can become another user, by setpriv")
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps", RIGHTS, "--ambient-caps", RIGHTS]
    environment = {"PATH": os.defpath, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.getcwd()
    ended = subprocess.run(
        [setpriv, *user, sys.executable, *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if "ambient" in ended.stderr and "setpriv" in ended.stderr:
        pytest.skip(f"this machine lets nobody become another user: {ended.stderr.strip()}")
    return ended
