"""Alerts of a run: in the log, among TensorBoard's texts, and to a webhook whose address is a secret of the machine.

The address is the value of SATFUSION_ALERT_WEBHOOK, or the content of the file that SATFUSION_ALERT_WEBHOOK_FILE names.
It is never logged, and no part of a configuration.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import urllib3
from msgspec import Meta

from sharding.errors import UserError
from sharding.files import read_text
from sharding.schema import check_ranges

logger = logging.getLogger(__name__)

URL_VARIABLE, FILE_VARIABLE = "SATFUSION_ALERT_WEBHOOK", "SATFUSION_ALERT_WEBHOOK_FILE"
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class AlertsConfig:
    """Rules of alerts; a loss that is not finite always raises one."""

    stalled_seconds: Annotated[float, Meta(ge=0, le=10**7)] = 0.0
    """Seconds without a step or a validation that end in an alert; 0 raises none. A validation is one pause, so choose
    more than it takes."""
    psnr_below: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """PSNR of a validation below which an alert is raised, dB, as for one that is NaN; 0 raises none."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, lambda item: f"alerts.{item.name} =")


class Alerts:
    """Alerts of one run, raised on rank 0; each rule speaks once, and again after its condition has ended."""

    def __init__(self, config: AlertsConfig, run: str, note: Callable[[int, str], None]) -> None:
        """Begin to wait for the first step.

        Args:
            config: The rules.
            run: URI of the run, named in each alert.
            note: Function that writes a text of a step to TensorBoard's events.
        """
        self._config, self._run, self._note = config, run, note
        self._url = webhook_address(os.environ)
        self._step = 0
        self._poor = self._stalled = False
        self._moved = time.monotonic()
        self._stop = threading.Event()
        self._senders: list[threading.Thread] = []
        self._watch: threading.Thread | None = None
        if config.stalled_seconds:
            self._watch = threading.Thread(target=self._watch_forever, name="alerts", daemon=True)
            self._watch.start()

    def step(self, step: int) -> None:
        """Take note of a step that is complete."""
        self._step, self._moved, self._stalled = step, time.monotonic(), False

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compare the metrics of a validation, by VAL_TAGS, with the rules."""
        self.step(step)
        limit, psnr = self._config.psnr_below, metrics["val/psnr"]
        # No comparison with NaN is true, and a PSNR that is no number is no good one.
        poor = bool(limit) and not psnr >= limit
        if poor and not self._poor:
            found = "not a number, with" if math.isnan(psnr) else f"{psnr:.4g} dB, below"
            self.send(step, f"validation PSNR is {found} alerts.psnr_below = {limit:g}")
        self._poor = poor

    def send(self, step: int, reason: str) -> None:
        """Raise an alert; what goes wrong with it is logged and stops nothing."""
        text = f"{self._run}, step {step}: {reason}"
        logger.warning("alert: %s", text)
        # An indented block is shown as it is, whatever the reason quotes.
        self._note(step, f"    {text}")
        if self._url:
            # The training does not wait for another machine.
            sender = threading.Thread(target=_post, args=(self._url, self._run, step, text), daemon=True)
            sender.start()
            self._senders.append(sender)

    def close(self) -> None:
        """Stop watching, and wait for alerts that are being sent."""
        self._stop.set()
        if self._watch is not None:
            self._watch.join()
        for sender in self._senders:
            sender.join(2 * _TIMEOUT_SECONDS)

    def _watch_forever(self) -> None:
        limit = self._config.stalled_seconds
        pause = limit
        while not self._stop.wait(pause):
            quiet = time.monotonic() - self._moved
            if quiet >= limit and not self._stalled:
                self._stalled = True
                self.send(self._step, f"no step for {math.floor(quiet)} s (alerts.stalled_seconds = {limit:g})")
            pause = limit - quiet if quiet < limit else limit


def webhook_address(environment: Mapping[str, str]) -> str | None:
    """Return the address of the webhook; None if there is none, or with a warning if it cannot be used."""
    address, source = environment.get(URL_VARIABLE, ""), URL_VARIABLE
    if not address and (name := environment.get(FILE_VARIABLE)):
        source = FILE_VARIABLE
        try:
            address = read_text(FILE_VARIABLE, str(Path(name)))
        except UserError as error:
            logger.warning("alerts go to the log and to TensorBoard alone: %s", error)
            return None
    address = address.strip()
    if not address:
        return None
    if not address.startswith(("https://", "http://")) or not address.isprintable():
        logger.warning("alerts go to the log and to TensorBoard alone: %s holds no http:// or https:// address", source)
        return None
    return address


def _post(address: str, run: str, step: int, text: str) -> None:
    """Send an alert as JSON; its field ``text`` is what chat services show."""
    try:
        with urllib3.PoolManager(num_pools=1) as pool:
            answer = pool.request(
                "POST",
                address,
                json={"text": text, "run": run, "step": step},
                timeout=_TIMEOUT_SECONDS,
                retries=False,
                preload_content=False,
            )
            answer.close()
        if answer.status >= 300:
            logger.warning("the alert's webhook answered with HTTP status %d", answer.status)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        # Its text may repeat the address.
        logger.warning("the alert's webhook could not be reached (%s)", type(error).__name__)
