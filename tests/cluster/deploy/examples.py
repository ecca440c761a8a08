"""Descriptions of deployments that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

from cluster.deploy.spec import DeploySpec, load_spec

WHOLE = """
image = "registry.example.org/satfusion:1"
name = "fusion"

[run]
config = "srcnn_pnn"
overrides = ["data.uri=s3://bucket/worldstrat", "output.uri=s3://bucket/runs/1", "train.global_batch=64"]
max_failures = 4

[workers]
count = 8
per_node = 4
cpus = 6
memory_gib = 20

[limits]
hours = 2.5
retries = 3
grace_seconds = 90
keep_seconds = 30

[storage]
endpoint = "https://s3.example.org"
region = "eu-central-1"
secret = "keys-of-s3"
credentials_file = "~/keys-of-s3"

[kuberay]
namespace = "ml"
token_secret = "token-of-ray"
redis_address = "redis.ml:6379"
redis_secret = "password-of-redis"

[slurm]
partition = "gpu"
account = "team"
environment = "/shared/venv"
"""
"""A deployment that names something in every place: 8 ranks with a GPU each on 2 nodes."""


def spec_of(text: str, folder: Path) -> DeploySpec:
    """Return what a TOML text describes."""
    path = folder / "deploy.toml"
    path.write_text(text, encoding="utf-8")
    return load_spec(path)
