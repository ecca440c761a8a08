"""Typed description of a deployment, as the TOML file of `satfusion cluster render` gives it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from cluster.jobs.placement import Placement
from cluster.jobs.submit import JobRequest, build_request
from pipeline.config import RunConfig, load_config
from pipeline.values import build_config, require
from sharding.errors import UserError
from sharding.files import regular_file
from sharding.names import refuse_secret

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SECRET_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][\w./:@-]*")
_WORD = re.compile(r"[\w.:@,+-]*")
_PATH = re.compile(r"/[\w./+-]*")
_HOME_PATH = re.compile(r"(/|~/)[\w./+-]*")
_HOST_PORT = re.compile(r"[\w.-]+:\d+")
# KubeRay adds a suffix to a RayJob's name for the cluster, and Kubernetes cuts names of services at 63.
_MAX_NAME = 47
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class RunSpec:
    """The run to train, and its restarts."""

    config: str = "srcnn_pnn"
    """Recipe, or a TOML file of a run's configuration; a relative path starts at the working directory."""
    overrides: tuple[str, ...] = ()
    """Overrides ``section.key=value`` of the configuration, as on the command line."""
    max_failures: int = 5
    """Restarts within one attempt after a lost rank or node, >= 0."""
    wait_for_resources: float = 1800.0
    """Seconds that the cluster gets to grow before the first step and each restart, >= 0."""


@dataclass(frozen=True)
class WorkersSpec:
    """Ranks, and the resources of each."""

    count: int = 1
    """Ranks, >= 1."""
    per_node: int = 1
    """Ranks of each node (pod, host or instance), >= 1; divides ``count``."""
    gpus: int = 1
    """GPUs of each rank, >= 0; 0 trains on CPU."""
    cpus: int = 4
    """CPU cores of each rank, >= 1."""
    memory_gib: int = 16
    """Memory of each rank, GiB, >= 1."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        for name in ("count", "per_node", "cpus", "memory_gib"):
            require(getattr(self, name) >= 1, f"workers.{name}", getattr(self, name), "a whole number from 1 up")
        require(self.gpus >= 0, "workers.gpus", self.gpus, "a whole number from 0 up")
        require(
            self.count % self.per_node == 0, "workers.per_node", self.per_node, f"a divisor of {self.count} workers"
        )

    @property
    def nodes(self) -> int:
        """Return the number of nodes with ranks."""
        return self.count // self.per_node


@dataclass(frozen=True)
class HeadSpec:
    """Resources of Ray's head, which runs the driver and no rank."""

    cpus: int = 2
    """CPU cores, >= 1."""
    memory_gib: int = 8
    """Memory, GiB, >= 2."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        require(self.cpus >= 1, "head.cpus", self.cpus, "a whole number from 1 up")
        require(self.memory_gib >= 2, "head.memory_gib", self.memory_gib, "a whole number from 2 up")


@dataclass(frozen=True)
class LimitsSpec:
    """Limits of time, and so of cost."""

    hours: float = 24.0
    """Time limit of one attempt, hours, > 0."""
    retries: int = 2
    """Further attempts after one that failed, was preempted or ran out of time, >= 0; each resumes from the newest
    checkpoint."""
    grace_seconds: int = 120
    """Seconds between the notice of an end and the end, >= 1."""
    idle_seconds: int = 300
    """Seconds after which an idle node is released, >= 1."""
    keep_seconds: int = 600
    """Seconds that an ended job's cluster is kept for its logs, >= 0."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        require(1 / 60 <= self.hours <= 10_000, "limits.hours", self.hours, "a number from 1/60 to 10000")
        require(self.retries >= 0, "limits.retries", self.retries, "a whole number from 0 up")
        require(self.grace_seconds >= 1, "limits.grace_seconds", self.grace_seconds, "a whole number from 1 up")
        require(self.idle_seconds >= 1, "limits.idle_seconds", self.idle_seconds, "a whole number from 1 up")
        require(self.keep_seconds >= 0, "limits.keep_seconds", self.keep_seconds, "a whole number from 0 up")

    @property
    def seconds(self) -> int:
        """Return the time limit of one attempt, s."""
        return round(self.hours * 3600)


@dataclass(frozen=True)
class StorageSpec:
    """Object storage; keys are named, never written."""

    endpoint: str = ""
    """URL of an S3 server other than AWS."""
    region: str = ""
    """Region of the bucket."""
    secret: str = ""
    """Name of a Kubernetes secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "" uses the pods'
    service account."""
    credentials_file: str = ""
    """Path of a credentials file of AWS on the nodes of a Slurm cluster; "" uses ~/.aws/credentials."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be what they are called."""
        url = not self.endpoint or re.fullmatch(r"https?://[\w.\[\]:-]+/?", self.endpoint) is not None
        require(url, "storage.endpoint", self.endpoint, "a URL such as https://s3.example.org")
        _match("storage.region", self.region, _WORD, "a region such as eu-central-1")
        _name_of_secret("storage.secret", self.secret)
        _optional_path("storage.credentials_file", self.credentials_file, _HOME_PATH)


@dataclass(frozen=True)
class KubeRaySpec:
    """Kubernetes with the KubeRay operator."""

    namespace: str = "default"
    """Namespace of all objects."""
    service_account: str = ""
    """Service account of the worker pods, for cloud roles; "" uses the namespace's default."""
    token_secret: str = ""
    """Name of a secret whose key ``auth_token`` is Ray's token; "" lets KubeRay make one with a random token."""
    queue: str = ""
    """Name of Kueue's LocalQueue that admits the RayJob, then of fixed size; "" starts it at once, with autoscaling."""
    redis_address: str = ""
    """``host:port`` of the Redis server that holds the RayCluster's state, so that it survives its head; "" keeps the
    state in the head."""
    redis_secret: str = ""
    """Name of a secret whose key ``password`` is the Redis server's password; "" sends none."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be what they are called."""
        _match("kuberay.namespace", self.namespace, _LABEL, "a name of a-z, 0-9 and '-'")
        for name in ("service_account", "token_secret", "queue", "redis_secret"):
            _name_of_secret(f"kuberay.{name}", getattr(self, name))
        redis = not self.redis_address or _HOST_PORT.fullmatch(self.redis_address) is not None
        require(redis, "kuberay.redis_address", self.redis_address, "HOST:PORT")
        alone = not self.redis_secret or bool(self.redis_address)
        require(alone, "kuberay.redis_secret", self.redis_secret, '"" without kuberay.redis_address')


@dataclass(frozen=True)
class SlurmSpec:
    """A Slurm cluster."""

    partition: str = ""
    """Partition; "" is the cluster's default."""
    account: str = ""
    """Account that is charged; "" is the user's default."""
    environment: str = ""
    """Absolute path of a virtual environment that all nodes see; "" takes `ray` and `python` from the PATH."""
    container: str = ""
    """Absolute path of an Apptainer image that all nodes see, in place of ``environment``."""
    exclusive: bool = True
    """Take whole nodes. Ray refuses to start where another Ray runs, and its end stops every Ray of the user there."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be what they are called."""
        for name in ("partition", "account"):
            _match(f"slurm.{name}", getattr(self, name), _WORD, "a name of letters, digits and _.:@,+-")
        for name in ("environment", "container"):
            _optional_path(f"slurm.{name}", getattr(self, name), _PATH)
        one = not (self.environment and self.container)
        require(one, "slurm.container", self.container, '"" with slurm.environment: give one of them')


@dataclass(frozen=True)
class AwsSpec:
    """Instances of AWS, started by Ray's cluster launcher."""

    region: str = "us-east-1"
    """Region of the instances."""
    head_type: str = "m7i.xlarge"
    """Instance type of the head."""
    worker_type: str = "g6.2xlarge"
    """Instance type of a node; has at least ``workers.per_node`` times the GPUs and cores of a worker."""
    spot: bool = True
    """Take spot instances for the nodes: cheaper, and AWS takes them back on two minutes' notice."""
    disk_gb: int = 100
    """Disk of each instance, GB, >= 50."""
    head_profile: str = ""
    """Name of the head's instance profile, which starts and ends instances; "" lets Ray make one, with all rights on
    EC2 and S3."""
    worker_profile: str = "ray-worker-v1"
    """Name of the nodes' instance profile, which reads and writes the bucket; Ray makes none."""
    security_group: str = ""
    """Id of a security group for all instances; "" lets Ray make one, with port 22 open to all addresses."""
    token_file: str = field(default="~/.ray/auth_token")
    """File on the machine that runs `ray up` with Ray's token, made by `ray get-auth-token --generate`."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be what they are called."""
        for name in ("region", "head_type", "worker_type", "worker_profile"):
            require(getattr(self, name) != "", f"aws.{name}", "", "a name of AWS")
        for name in ("region", "head_type", "worker_type", "head_profile", "worker_profile", "security_group"):
            _match(f"aws.{name}", getattr(self, name), _WORD, "a name of AWS")
        require(self.disk_gb >= 50, "aws.disk_gb", self.disk_gb, "a whole number from 50 up")
        _match("aws.token_file", self.token_file, _HOME_PATH, "an absolute path, or one that starts with ~/")


@dataclass(frozen=True)
class DeploySpec:
    """Complete description of a deployment."""

    image: str
    """Container image with the four packages, Ray and `python` on its PATH, for example built from the Dockerfile."""
    name: str = "satfusion"
    """Name of the job and of the cluster."""
    job_folder: str = "/etc/satfusion"
    """Absolute path, in the head's container, of the folder with the job's file."""
    run: RunSpec = field(default_factory=RunSpec)
    """The run to train, and its restarts."""
    workers: WorkersSpec = field(default_factory=WorkersSpec)
    """Ranks, and the resources of each."""
    head: HeadSpec = field(default_factory=HeadSpec)
    """Resources of Ray's head."""
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    """Limits of time."""
    storage: StorageSpec = field(default_factory=StorageSpec)
    """Object storage."""
    kuberay: KubeRaySpec = field(default_factory=KubeRaySpec)
    """Kubernetes."""
    slurm: SlurmSpec = field(default_factory=SlurmSpec)
    """Slurm."""
    aws: AwsSpec = field(default_factory=AwsSpec)
    """AWS."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be what they are called."""
        _match("name", self.name, _LABEL, "a name of a-z, 0-9 and '-' that starts with a letter")
        require(len(self.name) <= _MAX_NAME, "name", self.name, f"at most {_MAX_NAME} characters long")
        _match("image", self.image, _IMAGE, "a container image such as registry.example.org/satfusion:1")
        _match("job_folder", self.job_folder, _PATH, "an absolute path of letters, digits and _./+-")

    @property
    def placement(self) -> Placement:
        """Return the ranks as `satfusion submit` describes them."""
        return Placement(
            workers=self.workers.count,
            cpus_per_worker=float(self.workers.cpus),
            gpus_per_worker=float(self.workers.gpus),
            max_failures=self.run.max_failures,
            wait_for_resources=self.run.wait_for_resources,
        )

    def config(self) -> RunConfig:
        """Return the resolved configuration of the run.

        Raises:
            UserError: Like `load_config`, or for a relative path, which names no folder on another machine.
        """
        config = load_config(self.run.config, self.run.overrides)
        for option, uri in places(config).items():
            wanted = "s3://BUCKET/PREFIX, or an absolute path that every node sees"
            require(uri.startswith(("s3://", "/")), f"run.overrides: {option}", uri, wanted)
        return config

    def request(self) -> JobRequest:
        """Return what `satfusion submit` would send for this run.

        Raises:
            UserError: Like `config` and `build_request`.
        """
        named = {"AWS_ENDPOINT_URL": self.storage.endpoint, "AWS_REGION": self.storage.region}
        return build_request(self.config(), self.placement, named, Path("/"))

    def cost(self) -> str:
        """Return a sentence with the most that the run can take of the machines with ranks."""
        kind, each = ("GPU", self.workers.gpus) if self.workers.gpus else ("CPU", self.workers.cpus)
        amount, attempts = each * self.workers.count, self.limits.retries + 1
        return (
            f"At most {amount} {kind}s on {self.workers.nodes} nodes for {self.limits.hours:g} h in each of "
            f"{attempts} attempts: {amount * self.limits.hours * attempts:g} {kind}-hours, and the head."
        )


def load_spec(path: Path) -> DeploySpec:
    """Read the TOML file of a deployment.

    Raises:
        UserError: The file cannot be read, or a key or value in it is wrong; it names the nearest valid key.
    """
    refuse_secret("the file", str(path))
    if regular_file("the description", path) > _MAX_BYTES:
        raise UserError(f"{path} is larger than {_MAX_BYTES} bytes: it is no description of a deployment")
    try:
        content = path.read_bytes()
        values = tomllib.loads(content.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): give the TOML file of a deployment") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    if "image" not in values:
        raise UserError(
            f'{path} names no container image: add a line such as image = "registry.example.org/satfusion:1"'
        )
    return build_config(DeploySpec, values, str(path))


def _match(option: str, value: str, pattern: re.Pattern[str], wanted: str) -> None:
    require(pattern.fullmatch(value) is not None, option, value, wanted)


def _optional_path(option: str, value: str, pattern: re.Pattern[str]) -> None:
    good = not value or pattern.fullmatch(value) is not None
    require(good, option, value, "an absolute path of letters, digits and _./+-")


def _name_of_secret(option: str, value: str) -> None:
    # What does not look like a name may be the secret itself, so it is not repeated.
    if value and (len(value) > 253 or _SECRET_NAME.fullmatch(value) is None):
        raise UserError(
            f"{option} is no name of a Kubernetes object: give its name, of a-z, 0-9, '-' and '.', no value"
        )


def places(config: RunConfig) -> dict[str, str]:
    """Return the URIs of a run that its nodes read or write, by key."""
    uris = config.data.uris
    datasets = {"data.uri" if len(uris) == 1 else f"data.uri[{number}]": uri for number, uri in enumerate(uris)}
    found = {**datasets, "output.uri": config.output.uri, "train.init": config.train.init}
    return {option: uri for option, uri in found.items() if uri}
