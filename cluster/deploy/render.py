"""Rendering: which files a target has, and writing them without touching files of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.deploy import aws, image, kuberay, slurm
from cluster.deploy.crds import check_documents
from cluster.deploy.spec import DeploySpec, places
from cluster.deploy.text import MARK
from cluster.jobs.submit import JOB_FILE
from pipeline.values import require
from sharding.errors import UserError
from sharding.storage import LocalStorage


def _job(spec: DeploySpec) -> str:
    """Return the job's file, which the driver reads."""
    job = json.loads(spec.request().job.to_json())
    del job["about"]
    return json.dumps({"about": MARK, **job}, indent=1) + "\n"  # at the top, where it is looked for


TARGETS: Mapping[str, Mapping[str, Callable[[DeploySpec], str]]] = {
    "kuberay": {"rayjob.yaml": kuberay.rayjob, "raycluster.yaml": kuberay.raycluster},
    "slurm": {"slurm.sh": slurm.batch_script, JOB_FILE: _job},
    "docker": {"Dockerfile": image.dockerfile, "Dockerfile.dockerignore": image.dockerignore},
    "apptainer": {"apptainer.def": image.apptainer},
    "aws": {"aws.yaml": aws.launcher, JOB_FILE: _job},
}
"""Files of each target by name, with the function that returns the text."""

_WITHOUT_SHARED_FILES = ("kuberay", "aws")


def render(spec: DeploySpec, targets: Sequence[str], crds: Path | None = None) -> dict[str, str]:
    """Return the text of each file of the targets by name.

    Args:
        spec: Description of the deployment.
        targets: Keys of `TARGETS`.
        crds: Folder with KubeRay's custom resource definitions, which its documents are compared with; None for no
            comparison.

    Raises:
        UserError: A value that does not fit a target, or a document that a definition refuses.
    """
    for target in _WITHOUT_SHARED_FILES:
        if target in targets:
            _require_s3(spec, target)
    texts = {name: write(spec) for target in targets for name, write in TARGETS[target].items()}
    if crds is not None:
        kinds = [texts[name] for name in TARGETS["kuberay"] if name in texts]
        check_documents(kinds, crds)
    return texts


def write(texts: Mapping[str, str], folder: Path) -> None:
    """Write the files into a folder, which is created if absent; earlier rendered ones are replaced.

    Raises:
        UserError: A file of that name was not rendered by this command, or the folder cannot be written. In the first
            case nothing is written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in texts:
            if not _is_ours(folder / name):
                raise UserError(
                    f"{folder / name} exists and was not rendered by this command: move it, or choose another --to"
                )
        for name, text in texts.items():
            LocalStorage(folder).write(name, text.encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}): choose another --to") from error


def _require_s3(spec: DeploySpec, target: str) -> None:
    for option, uri in places(spec.config()).items():
        require(uri.startswith("s3://"), f"run.overrides: {option}", uri, f"s3://BUCKET/PREFIX for --target {target}")


def _is_ours(path: Path) -> bool:
    """Return whether nothing of others stands at a path."""
    if not path.exists() and not path.is_symlink():
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return any(MARK in file.readline(1000) for _ in range(2))
