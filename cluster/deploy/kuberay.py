"""KubeRay: a RayJob that trains and releases its nodes, and a RayCluster that takes jobs of `satfusion submit`."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from cluster.deploy.spec import DeploySpec
from cluster.deploy.text import header, to_yaml
from cluster.jobs.submit import JOB_FILE, TRAIN_DRIVER, JobRequest
from sharding.storage.lock import JOB_VARIABLE

Values = dict[str, Any]

_EXPOSES = (
    "Exposes: inside the Kubernetes cluster, the head's service takes code from whoever has Ray's token, unencrypted; "
    "no ingress is made. Pods read secrets by name: this file holds none."
)


def rayjob(spec: DeploySpec) -> str:
    """Return the YAML of a RayJob and of the ConfigMap with its job's file.

    Raises:
        UserError: Like `DeploySpec.request`, or for a dataset or run folder that is not on S3.
    """
    request = spec.request()
    cluster = _cluster(spec)
    head = cluster["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [{"name": "job", "configMap": {"name": _config_map_name(spec)}}]
    head["containers"][0]["volumeMounts"] = [{"name": "job", "mountPath": spec.job_folder, "readOnly": True}]
    limits = spec.limits
    # The run folder knows the job again when KubeRay retries it on a fresh cluster, and gives it its lock at once.
    environment = {**request.environment, JOB_VARIABLE: f"kuberay-{spec.kuberay.namespace}-{spec.name}"}
    job: Values = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(spec, spec.name),
        "spec": {
            "entrypoint": f"{TRAIN_DRIVER} {spec.job_folder.rstrip('/')}/{JOB_FILE}",
            "runtimeEnvYAML": to_yaml([{"env_vars": environment}]),
            "metadata": dict(request.metadata),
            "submissionMode": "K8sJobMode",
            # Of each attempt: KubeRay begins to count anew when it retries with a fresh cluster.
            "activeDeadlineSeconds": limits.seconds,
            "backoffLimit": limits.retries,
            **_end(limits.keep_seconds),
            "rayClusterSpec": cluster,
        },
    }
    if spec.kuberay.queue:
        _queue(job, spec)
    begin = "the queue admits the job" if spec.kuberay.queue else "the driver asks for them"
    text = header(
        f"Costs: {spec.cost()} Nodes start when {begin} and are released {limits.keep_seconds} s after the job's end.",
        _EXPOSES,
    )
    return text + to_yaml([_config_map(spec, request), job])


def raycluster(spec: DeploySpec) -> str:
    """Return the YAML of a RayCluster whose nodes with ranks come and go with the jobs."""
    cluster = _cluster(spec)
    redis = spec.kuberay.redis_address
    if redis:
        options: Values = {"redisAddress": redis}
        if spec.kuberay.redis_secret:
            options["redisPassword"] = {"valueFrom": _from_secret(spec.kuberay.redis_secret, "password")}
        cluster["gcsFaultToleranceOptions"] = options
    document = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(spec, spec.name),
        "spec": cluster,
    }
    text = header(
        f"Costs: the head as long as the RayCluster exists, and up to {spec.workers.nodes} nodes with ranks while jobs "
        f"ask for them; an idle one is released after {spec.limits.idle_seconds} s.",
        _EXPOSES,
    )
    return text + to_yaml([document])


def _cluster(spec: DeploySpec) -> Values:
    """Return the specification that a RayJob and a RayCluster share."""
    kuberay = spec.kuberay
    head, workers = spec.head, spec.workers
    gpus = {"nvidia.com/gpu": workers.gpus * workers.per_node} if workers.gpus else {}
    worker = _pod(spec, "ray-worker", workers.cpus * workers.per_node, workers.memory_gib * workers.per_node, gpus)
    # The head alone talks to Kubernetes, as the autoscaler.
    worker["automountServiceAccountToken"] = False
    worker["terminationGracePeriodSeconds"] = spec.limits.grace_seconds
    if gpus:
        worker["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "rayVersion": metadata.version("ray"),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": spec.limits.idle_seconds},
        "authOptions": {"mode": "token", **({"secretName": kuberay.token_secret} if kuberay.token_secret else {})},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},  # No rank runs here.
            "template": {"spec": _pod(spec, "ray-head", head.cpus, head.memory_gib, {})},
        },
        "workerGroupSpecs": [
            {
                "groupName": "ranks",
                "replicas": 0,
                "minReplicas": 0,
                "maxReplicas": workers.nodes,
                "rayStartParams": {},
                "template": {"spec": worker},
            }
        ],
    }


def _pod(spec: DeploySpec, name: str, cpus: int, memory_gib: int, more: Values) -> Values:
    """Return a pod's specification with one container, whose requests equal its limits."""
    resources = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **more}
    container: Values = {
        "name": name,
        "image": spec.image,
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if secret := spec.storage.secret:
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        container["env"] = [{"name": key, "valueFrom": _from_secret(secret, key)} for key in keys]
    account = {"serviceAccountName": spec.kuberay.service_account} if spec.kuberay.service_account else {}
    return {
        **account,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }


def _from_secret(name: str, key: str) -> Values:
    return {"secretKeyRef": {"name": name, "key": key}}


def _metadata(spec: DeploySpec, name: str) -> Values:
    return {"name": name, "namespace": spec.kuberay.namespace, "labels": {"app.kubernetes.io/name": "satfusion"}}


def _config_map_name(spec: DeploySpec) -> str:
    return f"{spec.name}-job"


def _config_map(spec: DeploySpec, request: JobRequest) -> Values:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, _config_map_name(spec)),
        "immutable": True,
        "data": {JOB_FILE: request.job.to_json() + "\n"},
    }


def _end(seconds: int) -> Values:
    """Return the rules by which a RayJob's cluster is deleted after the job's end."""
    rules = [
        _delete_cluster_after(seconds, jobStatus="SUCCEEDED"),
        _delete_cluster_after(seconds, jobStatus="FAILED"),
        # A job that ran out of time, or was never sent, has no status of its own.
        _delete_cluster_after(seconds, jobDeploymentStatus="Failed"),
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def _queue(job: Values, spec: DeploySpec) -> None:
    """Let Kueue start a RayJob: it admits all pods of a cluster of fixed size at once."""
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = spec.kuberay.queue
    del job["spec"]["deletionStrategy"]  # KubeRay lets only a job that ends its cluster itself be suspended.
    job["spec"] |= {
        "suspend": True,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": spec.limits.keep_seconds,
    }
    cluster = job["spec"]["rayClusterSpec"]
    cluster["enableInTreeAutoscaling"] = False
    del cluster["autoscalerOptions"]
    nodes = spec.workers.nodes
    cluster["workerGroupSpecs"][0] |= {"replicas": nodes, "minReplicas": nodes, "maxReplicas": nodes}


def _delete_cluster_after(seconds: int, **condition: str) -> Values:
    return {"condition": {**condition, "ttlSeconds": seconds}, "policy": "DeleteCluster"}
