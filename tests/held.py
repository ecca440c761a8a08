"""The real command, whose training waits for ever once it has logged a step: whoever kills it there is never late.

``python -m tests.held STEP ARGUMENTS`` is ``satfusion ARGUMENTS`` up to then.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import cast

from cluster.cli import main
from pipeline.reporting.events import CsvLog

if __name__ == "__main__":
    held_at, write_row = int(sys.argv[1]), CsvLog.row

    def hold(log: CsvLog, values: Mapping[str, object]) -> None:
        write_row(log, values)
        if cast(int, values["step"]) >= held_at:
            threading.Event().wait()

    CsvLog.row = hold  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
