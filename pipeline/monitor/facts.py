"""Facts of a run from its config.json, which may be of any version, or of another program: nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.reporting.run_folder import CONFIG_FILE
from sharding.names import is_text
from sharding.storage import NotFoundError, Storage

_LARGEST = 1 << 20
"""Largest config.json that is read, bytes."""
ENVIRONMENT = "environment"
"""Section of config.json that is no configuration: versions, the world, the dataset's digest."""
SEED = "train.seed"
"""Setting that is a name rather than a number."""
_NOT_COMPARED = (("train", "seed"), ("output", "uri"))
HPARAMS = (
    "model.encoder",
    "model.head",
    "model.hidden",
    "train.learning_rate",
    "train.global_batch",
    "train.epochs",
    SEED,
    "train.precision",
    "train.zero_stage",
    "data.simulate",
    "environment.world_size",
)
"""Settings shown on TensorBoard's page HParams, if a run has them."""


@dataclass(frozen=True)
class Facts:
    """Configuration and environment of a run."""

    sections: Mapping[str, Mapping[str, Any]]
    """Sections of config.json: values that are texts, numbers and booleans, without those that are no Unicode."""

    def hparams(self) -> dict[str, str | float | bool]:
        """Return the values of HPARAMS that the run has."""
        values: dict[str, str | float | bool] = {}
        for key in HPARAMS:
            section, _, name = key.partition(".")
            value = self.sections.get(section, {}).get(name)
            if isinstance(value, str | float | bool) or (isinstance(value, int) and abs(value) < 2**63):
                # The page shows numbers with five digits, and would show neighbouring seeds alike.
                values[key] = str(value) if key == SEED else value
        return values

    @property
    def model(self) -> str:
        """Return ``ENCODER+HEAD``; a question mark stands for an unknown one."""
        model = self.sections.get("model", {})
        return f"{model.get('encoder', '?')}+{model.get('head', '?')}"

    @property
    def seed(self) -> object:
        """Return the seed of the run."""
        return self.sections.get("train", {}).get("seed")

    @property
    def experiment(self) -> str:
        """Return a digest of the configuration without seed and run folder, and of the dataset."""
        compared = {
            section: {key: value for key, value in values.items() if (section, key) not in _NOT_COMPARED}
            for section, values in self.sections.items()
            if section != ENVIRONMENT
        }
        compared[ENVIRONMENT] = {"index_digest": self.sections.get(ENVIRONMENT, {}).get("index_digest")}
        return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def read_facts(run: Storage) -> Facts | None:
    """Return the facts of a run; None if it has no config.json yet, or none that can be read.

    Raises:
        UserError: The store does not answer.
    """
    try:
        text = run.read_range(CONFIG_FILE, 0, _LARGEST + 1)
        if len(text) > _LARGEST:
            return None
        data = json.loads(text)
    except (NotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    return Facts(
        {
            section: {key: value for key, value in values.items() if is_text(key) and _is_plain(value)}
            for section, values in data.items()
            if isinstance(values, dict) and is_text(section)
        }
    )


def _is_plain(value: object) -> bool:
    return is_text(value) if isinstance(value, str) else isinstance(value, int | float | bool)
