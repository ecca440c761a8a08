"""A pytest plugin, ``-p benchmarks.gpu_outcomes``: each test's outcome as a line of JSON, as soon as it is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.results import emit


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the outcome of a test's call, or of the phase before or after it that failed or skipped it."""
    if report.when != "call" and report.passed:
        return
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    measured = {name: value for name, value in report.user_properties}
    reason = {"reason": report.longrepr[2]} if report.skipped and isinstance(report.longrepr, tuple) else {}
    failed = {"traceback": str(report.longrepr)} if report.failed else {}
    emit(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2), **measured, **reason, **failed)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write an error for each file that could not be collected."""
    if report.failed:
        emit(test=report.nodeid, outcome="not collected", traceback=str(report.longrepr))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Write the number of deselected tests."""
    emit(tests=len(items), outcome="not chosen")
