"""Kubernetes' files: KubeRay's fields, probes that do no harm, drains that have the time they need."""

import re

import pytest
from deployfiles import DEPLOY, ROOT, check_serve_config, environment, load_all, loads

from octavo.cluster.config import DeploymentConfig

DOCUMENTS = [document for path in sorted((DEPLOY / "kuberay").glob("*.yaml")) for document in load_all(path)]
# The fields of the reference of KubeRay 1.6.2, without what it calls deprecated or unsupported for a RayService.
SERVICE = {
    "excludeHeadPodFromServeSvc",
    "managedBy",
    "rayClusterConfig",
    "rayClusterDeletionDelaySeconds",
    "serveConfigV2",
    "serveService",
    "upgradeStrategy",
}
CLUSTER = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "rayVersion",
    "workerGroupSpecs",
}
HEAD = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKERS = {
    "groupName",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "resources",
    "scaleStrategy",
    "template",
}
AUTOSCALER = {
    "env",
    "envFrom",
    "idleTimeoutSeconds",
    "image",
    "imagePullPolicy",
    "resources",
    "securityContext",
    "upscalingMode",
    "version",
    "volumeMounts",
}
FAULT_TOLERANCE = {"externalStorageNamespace", "redisAddress", "redisPassword", "redisUsername"}
# HAProxy closes idle connections, KubeRay ends a Pod: what still has to happen after the last stream.
MARGIN_S = 60


def of_kind(kind):
    return [document for document in DOCUMENTS if document["kind"] == kind]


@pytest.fixture(scope="module")
def service():
    (found,) = of_kind("RayService")
    return found["spec"]


@pytest.fixture(scope="module")
def config(service) -> DeploymentConfig:
    (found,) = check_serve_config(loads(service["serveConfigV2"]))
    return found


def groups(service):
    return service["rayClusterConfig"]["workerGroupSpecs"]


def pod(group):
    return group["template"]["spec"]


def container(group):
    (found,) = pod(group)["containers"]
    return found


def test_every_document_says_what_it_is():
    versions = {(document["apiVersion"], document["kind"]) for document in DOCUMENTS}
    assert versions == {
        ("v1", "ConfigMap"),
        ("ray.io/v1", "RayService"),
        ("policy/v1", "PodDisruptionBudget"),
        ("monitoring.coreos.com/v1alpha1", "ScrapeConfig"),
        ("monitoring.coreos.com/v1", "PodMonitor"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
    }
    assert all(document["metadata"]["name"] for document in DOCUMENTS)


def test_kuberay_knows_the_fields(service):
    cluster = service["rayClusterConfig"]
    assert set(service) <= SERVICE
    assert set(cluster) <= CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
    assert set(cluster["gcsFaultToleranceOptions"]) <= FAULT_TOLERANCE
    assert cluster["authOptions"] == {"mode": "token"}
    for group in groups(service):
        assert set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [cluster["headGroupSpec"], *groups(service)]:
        # Flags of `ray start`, all of them strings.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_ray_is_the_version_that_octavo_asks_for(service):
    (pin,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert service["rayClusterConfig"]["rayVersion"] == pin


def test_the_environment_is_that_of_the_other_clusters(service):
    (found,) = of_kind("ConfigMap")
    by_kuberay = {"RAY_AUTH_MODE", "RAY_gcs_rpc_server_reconnect_timeout_s"}
    wanted = environment(DEPLOY / "ray" / "cluster.env")
    assert found["data"] == {name: value for name, value in wanted.items() if name not in by_kuberay}
    for group in [service["rayClusterConfig"]["headGroupSpec"], *groups(service)]:
        sources = [source["configMapRef"]["name"] for source in container(group)["envFrom"] if "configMapRef" in source]
        assert sources == [found["metadata"]["name"]]


def test_ingresses_are_placed_on_their_own_pods(service, config):
    (application,) = loads(service["serveConfigV2"])["applications"]
    (override,) = [item for item in application["deployments"] if item["name"] == "ingress"]
    wanted = override["ray_actor_options"]["label_selector"]
    (group,) = [group for group in groups(service) if group["labels"] == wanted]
    assert group["rayStartParams"]["num-cpus"] == "0"
    assert group["minReplicas"] >= config.num_ingresses > 1


def test_the_gpus_are_enough(service, config):
    gpus = sum(group["maxReplicas"] * gpus_of(group) for group in groups(service))
    wanted = sum(model.max_replicas * model.engine.num_ranks for model in config.models)
    assert gpus >= wanted
    for model in config.models:
        assert any(
            gpus_of(group) >= model.engine.tensor_parallel_size
            and int(container(group)["resources"]["limits"]["cpu"]) >= model.num_cpus * gpus_of(group)
            for group in groups(service)
            if gpus_of(group)
        )


def gpus_of(group):
    return int(container(group)["resources"]["limits"].get("nvidia.com/gpu", 0))


def test_no_engine_and_no_model_can_take_a_pod_down(service):
    """Liveness asks Ray alone, traffic the Pod's own proxy; /ready and /health speak of all models everywhere."""
    for group in groups(service):
        assert container(group)["livenessProbe"]["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}
        assert container(group)["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    head = container(service["rayClusterConfig"]["headGroupSpec"])
    assert head["livenessProbe"]["httpGet"]["path"] == head["readinessProbe"]["httpGet"]["path"] == "/api/gcs_healthz"


def test_drains_have_the_time_they_need(service, config):
    longest = max(config.ingress_drain_timeout_s, *(model.drain_timeout_s for model in config.models))
    for group in groups(service):
        *_, deadline = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert float(deadline) > longest
        assert pod(group)["terminationGracePeriodSeconds"] >= float(deadline) + MARGIN_S
    assert service["rayClusterDeletionDelaySeconds"] >= config.ingress_drain_timeout_s


def test_the_drain_is_in_the_images(service):
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (DEPLOY / "docker" / name).read_text()
        for group in groups(service):
            python, script, *_ = container(group)["lifecycle"]["preStop"]["exec"]["command"]
            assert f" {script}\n" in text
            assert python.startswith("/opt/octavo/bin/")
            assert pod(group)["securityContext"]["runAsUser"] == int(re.search(r"--uid (\d+)", text)[1])


def test_budgets_and_monitors_select_something(service):
    every = [service["rayClusterConfig"]["headGroupSpec"], *groups(service)]
    labels = [group["template"]["metadata"]["labels"] for group in every]
    for kind, at_least in (("PodDisruptionBudget", 1), ("PodMonitor", len(every))):
        for document in of_kind(kind):
            wanted = document["spec"]["selector"]["matchLabels"].items()
            assert sum(wanted <= given.items() for given in labels) >= at_least, document["metadata"]["name"]
    (monitor,) = of_kind("PodMonitor")
    (scraped,) = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for group in every:
        assert {port["name"]: port["containerPort"] for port in container(group)["ports"]}[scraped] == 8080


def test_shared_memory_is_not_left_at_64_megabytes(service):
    for group in [service["rayClusterConfig"]["headGroupSpec"], *groups(service)]:
        volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
        assert set(mounts.values()) <= set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
