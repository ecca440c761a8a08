"""AWS: the file of Ray's cluster launcher (`ray up`), with a head on demand and nodes that come and go."""

from __future__ import annotations

from typing import Any

from cluster.deploy.spec import DeploySpec
from cluster.deploy.text import header, to_yaml
from cluster.jobs.submit import JOB_FILE

# The image's user, in whose home Ray looks for its token.
_HOME = "/home/satfusion"
_START = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --disable-usage-stats"


def launcher(spec: DeploySpec) -> str:
    """Return the YAML of Ray's cluster launcher.

    Raises:
        UserError: Like `DeploySpec.request`.
    """
    aws, workers, limits = spec.aws, spec.workers, spec.limits
    resources = {"CPU": workers.cpus * workers.per_node, "GPU": workers.gpus * workers.per_node}
    values: dict[str, Any] = {
        "cluster_name": spec.name,
        "max_workers": workers.nodes,
        "idle_timeout_minutes": limits.idle_seconds / 60,
        "provider": {
            "type": "aws",
            "region": aws.region,
            # Stopped instances keep their disks, which cost.
            "cache_stopped_nodes": False,
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": spec.image,
            "container_name": spec.name,
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536", *_environment(spec)],
        },
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0},
                "node_config": _instance(spec, aws.head_type, aws.head_profile, spot=False),
            },
            "ranks": {
                "min_workers": 0,
                "max_workers": workers.nodes,
                "resources": {name: amount for name, amount in resources.items() if amount},
                "node_config": _instance(spec, aws.worker_type, aws.worker_profile, spot=aws.spot),
            },
        },
        "head_node_type": "head",
        "file_mounts": {
            f"{spec.job_folder.rstrip('/')}/{JOB_FILE}": JOB_FILE,
            f"{_HOME}/.ray/auth_token": aws.token_file,
        },
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_START} --address=$RAY_HEAD_IP:6379"],
    }
    reach = (
        f"what {aws.security_group} lets in"
        if aws.security_group
        else "all addresses, as Ray's own security group does"
    )
    market = "spot" if aws.spot else "on-demand"
    text = header(
        f"Costs: one {aws.head_type} until `ray down`, and up to {workers.nodes} {market} {aws.worker_type} while jobs "
        f"ask for them; an idle one is ended after {limits.idle_seconds} s. Nothing ends the head by itself but "
        "`ray exec --stop`.",
        f"Exposes: port 22 of each instance to {reach}; the dashboard listens on the head's loopback address alone. "
        "Ray's token comes from a file of the machine that runs `ray up`: this file holds no secret.",
    )
    return text + to_yaml([values])


def _environment(spec: DeploySpec) -> list[str]:
    variables = {"RAY_AUTH_MODE": "token", **spec.request().environment}
    return [f"--env {name}={value}" for name, value in variables.items()]


def _instance(spec: DeploySpec, kind: str, profile: str, *, spot: bool) -> dict[str, Any]:
    """Return the arguments of the instance's creation."""
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": spec.aws.disk_gb, "VolumeType": "gp3"}}
    # A hop limit of 2 lets the container reach the role's keys; version 2 alone keeps forged requests from them.
    config: dict[str, Any] = {
        "InstanceType": kind,
        "BlockDeviceMappings": [disk],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    if profile:
        config["IamInstanceProfile"] = {"Name": profile}
    if spec.aws.security_group:
        config["SecurityGroupIds"] = [spec.aws.security_group]
    return config
