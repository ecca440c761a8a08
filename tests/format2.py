"""Datasets of format 2, as the version that wrote them left them: index and sidecars without layouts and facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def to_format_2(folder: Path) -> bytes:
    """Rewrite a dataset as format 2 has it, with its shards beside the index, and return the bytes of the index."""
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
