"""Means over runs that differ in their seed alone, and their spread."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from pipeline.monitor.board import Board, RunOnBoard, start
from pipeline.monitor.discover import check_name
from sharding.errors import UserError

CURVES = ("seeds-mean", "seeds-low", "seeds-high")
"""Names of a group's runs: the mean of its runs, and one standard deviation below and above."""


class Seeds:
    """Groups of the runs on a board that differ in their seed alone."""

    def __init__(self, board: Board) -> None:
        """Begin without groups."""
        self._board = board
        self._groups: dict[str, _Group] = {}

    def update(self, runs: Iterable[RunOnBoard]) -> None:
        """Show the means of the groups in which something changed since the last call.

        Raises:
            OSError: The events cannot be written.
        """
        members = defaultdict(list)
        for run in runs:
            if run.facts is not None:
                members[run.facts.experiment].append(run)
        for experiment, group in members.items():
            if len({str(run.facts.seed) for run in group if run.facts}) > 1:
                if experiment not in self._groups:
                    self._groups[experiment] = _Group(self._label(group, experiment))
                self._groups[experiment].update(group, self._board)
            for run in group:
                run.first_changed = None

    def _label(self, group: list[RunOnBoard], experiment: str) -> str:
        """Return the name of the folder above all runs of a group, or of their model; it stays as it is."""
        model = group[0].facts.model if group[0].facts else ""
        try:
            check_name(model, "the runs")
        except UserError:  # any text may stand in a config.json
            model = experiment[:6]
        label = os.path.commonpath([run.name for run in group]) or model
        taken = {other.label for other in self._groups.values()}
        return f"{label}-{experiment[:6]}" if label in taken else label


class _Group:
    """Runs of one configuration with different seeds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._names: set[str] = set()
        self._shown: dict[str, int] = {}

    def update(self, runs: list[RunOnBoard], board: Board) -> None:
        """Write the steps that all runs have and that are new, or changed."""
        names = {run.name for run in runs}
        changed = [run.first_changed for run in runs if run.first_changed is not None]
        again = 0 if names != self._names else min(changed, default=None)
        if again is None:
            return
        if any(last >= again for last in self._shown.values()):
            for curve in CURVES:
                board.write(f"{self.label}/{curve}", [start(again)])
            self._shown = {tag: min(last, again - 1) for tag, last in self._shown.items()}
        by_step: dict[int, tuple[float, dict[str, npt.NDArray[np.float64]]]] = {}
        for tag in set.intersection(*(set(run.curves.by_key) for run in runs)):
            curves = [run.curves.by_key[tag] for run in runs]
            steps = functools.reduce(np.intersect1d, [np.array(curve.steps) for curve in curves])
            steps = steps[steps > self._shown.get(tag, -1)]
            if not len(steps):
                continue
            self._shown[tag] = int(steps[-1])
            rows = [np.searchsorted(np.array(curve.steps), steps) for curve in curves]
            values = np.stack([np.array(curve.values)[row] for curve, row in zip(curves, rows, strict=True)])
            seconds = np.array(curves[0].seconds)[rows[0]]
            mean, spread = values.mean(0), values.std(0, ddof=1)
            for step, second, three in zip(
                steps, seconds, np.stack([mean, mean - spread, mean + spread], 1), strict=True
            ):
                by_step.setdefault(int(step), (float(second), {}))[1][tag] = three
        for position, curve in enumerate(CURVES):
            board.write(
                f"{self.label}/{curve}",
                [
                    Event(step=step, wall_time=second, summary=_summary(values, position))
                    for step, (second, values) in sorted(by_step.items())
                ],
            )
        self._names = names  # last, so that what could not be written is written by the next update


def _summary(values: dict[str, npt.NDArray[np.float64]], position: int) -> Summary:
    return Summary(
        value=[Summary.Value(tag=tag, simple_value=float(three[position])) for tag, three in sorted(values.items())]
    )
