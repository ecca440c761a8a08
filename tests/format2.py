"""Datasets of format 2 and runs on them, as the version that wrote them left them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def to_format_2(folder: Path) -> bytes:
    """Rewrite a dataset as format 2 has it, and return the bytes of the index.

    Shards are beside the index; index and sidecars have neither layouts nor facts.
    """
    path = folder / "index.json"
    for generation in folder.glob("plan-*"):
        (generation / "index.json").unlink()
        for file in generation.iterdir():
            file.rename(folder / file.name)
        generation.rmdir()
    index = json.loads(path.read_bytes())
    del index["facts"], index["layouts"]
    for shards in index["splits"].values():
        for shard in shards:
            shard["name"] = shard["name"].rpartition("/")[2]
            _strip(shard)
    data = json.dumps(index | {"format_version": 2}, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(data)
    for sidecar in folder.glob("*.tar.json"):
        described = json.loads(sidecar.read_bytes())
        del described["layouts"]
        _strip(described["shard"])
        sidecar.write_bytes(json.dumps(described, sort_keys=True).encode())
    return data


def _strip(shard: dict[str, Any]) -> None:
    for sample in shard["samples"]:
        del sample["layout"]


LATER = {
    "data": ("simulated_revisits", "cloudy"),
    "train": ("checkpoint_seconds", "hang_seconds", "hang_start_seconds"),
    "output": ("panels_every",),
}
"""Keys of a configuration that came after format 2, by section; the section ``alerts`` did too."""


def to_run_of_that_time(run: Path) -> None:
    """Rewrite the configurations of a run folder as the version that wrote format 2 left them."""
    record = json.loads((run / "config.json").read_bytes())
    _strip_config(record)
    (run / "config.json").write_text(json.dumps(record))
    for marker in run.glob("checkpoints/*/COMPLETE"):
        meta = json.loads((marker.parent / "checkpoint.json").read_bytes())
        _strip_config(meta["config"])
        data = json.dumps(meta).encode()
        (marker.parent / "checkpoint.json").write_bytes(data)
        written = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        marker.write_text(json.dumps(json.loads(marker.read_bytes()) | {"checkpoint.json": written}))


def _strip_config(config: dict[str, Any]) -> None:
    del config["alerts"]
    for section, names in LATER.items():
        for name in names:
            del config[section][name]
