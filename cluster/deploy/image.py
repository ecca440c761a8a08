"""Container images: the same steps as a Dockerfile and as an Apptainer definition, run in a checkout."""

from __future__ import annotations

import sys

from cluster.deploy.spec import DeploySpec
from cluster.deploy.text import header
from cluster.logs import PACKAGES

_FOLDER = "/opt/satfusion"
_FILES = ("setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
_PIP = "python -m pip install --no-cache-dir --constraint constraints.txt"
_STEPS = (
    # DeepSpeed's CPU op and torch.compile need a compiler; KubeRay asks with wget whether Ray is well; Ray's launcher
    # copies files and starts commands inside the container.
    "apt-get update",
    "apt-get install --yes --no-install-recommends g++ openssh-client rsync tmux wget",
    "rm -rf /var/lib/apt/lists/*",
    f"{_PIP} pip setuptools wheel ninja",
    # Torch first, because DeepSpeed's build looks for it. Its wheels bring CUDA's libraries; the driver is the host's.
    f"{_PIP} torch numpy",
    f"{_PIP} --no-build-isolation .",
)
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
}
_NOT_BUILT = "Not built where this project is tested: its text is checked, no image was made of it."
_EXPOSES = "Exposes: nothing; it holds no key and starts nothing by itself."


def dockerfile(spec: DeploySpec) -> str:
    """Return the Dockerfile of the image."""
    text = header(
        f"In a checkout of the project: docker build --file FOLDER/Dockerfile --tag {spec.image} .",
        "Costs: a few GB on each node, most of them CUDA's libraries.",
        _EXPOSES,
        _NOT_BUILT,
    )
    steps = [*_STEPS[:3], "useradd --uid 1000 --create-home satfusion"]
    variables = " ".join(f"{name}={value}" for name, value in _VARIABLES.items())
    return (
        f"{text}FROM {_base()}\n"
        "# hadolint ignore=DL3008\n"  # Debian's release fixes the versions well enough.
        f"{_run(steps)}"
        f"ENV {variables} TORCH_EXTENSIONS_DIR={_FOLDER}/extensions\n"
        f"WORKDIR {_FOLDER}\n"
        f"COPY {' '.join(_FILES)} ./\n"
        # What changes often comes last: the steps above it are taken from the cache.
        f"{_run(_STEPS[3:5])}"
        f"{''.join(f'COPY {package} {package}' + chr(10) for package in PACKAGES)}"
        f"{_run([_STEPS[5], f'install --directory --owner=1000 {_FOLDER}/extensions'])}"
        "USER 1000\n"
        # With a driver present it compiles nothing; on CPU nodes the first training need not wait for it.
        "RUN python -m pipeline.engines.build_op\n"
    )


def dockerignore(spec: DeploySpec) -> str:
    """Return the list that keeps everything but the image's files from Docker: keys beside the checkout's code too."""
    return header() + "*\n" + "".join(f"!{name}\n" for name in (*_FILES, *PACKAGES)) + "**/__pycache__\n"


def apptainer(spec: DeploySpec) -> str:
    """Return the Apptainer definition of the image."""
    text = header(
        f"In a checkout of the project: apptainer build {spec.name}.sif FOLDER/apptainer.def",
        "Costs: a few GB on the shared file system, most of them CUDA's libraries.",
        f"{_EXPOSES} Inside it the user is the one who starts it.",
        _NOT_BUILT,
    )
    files = "".join(f"    {name} {_FOLDER}/{name}\n" for name in (*_FILES, *PACKAGES))
    variables = "".join(f"    export {name}={value}\n" for name, value in _VARIABLES.items())
    steps = "".join(f"    {step}\n" for step in (*_STEPS[:3], f"cd {_FOLDER}", *_STEPS[3:]))
    return (
        f"Bootstrap: docker\n{text}From: {_base()}\n\n%files\n{files}\n%environment\n{variables}\n"
        f"%post\n    set -eu\n{steps}"
    )


def _base() -> str:
    """Return the base image: the minor version of Python must be the one that submits."""
    return f"python:{sys.version_info.major}.{sys.version_info.minor}-slim-bookworm"


def _run(steps: list[str] | tuple[str, ...]) -> str:
    return "RUN " + " \\\n    && ".join(steps) + "\n"
