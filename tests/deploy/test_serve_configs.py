"""Every Serve config: Serve's schema, our settings, and the application that comes of it, built without a cluster."""

from importlib import import_module

import pytest
from deployfiles import DEPLOY, ROOT, check_serve_config, load
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app as build_serve_app

from octavo.cluster.app import APP, INGRESS, engine_name
from octavo.cluster.config import ModelConfig
from octavo.cluster.rollout_checks import read_deployment

CONFIGS = sorted((DEPLOY / "serve").glob("*.yaml"))
# Weights in GB of bfloat16, and GB of the GPU that the file's comments speak of.
SIZES = {"meta-llama/Llama-3.3-70B-Instruct": (141, 80), "meta-llama/Llama-3.1-405B-Instruct": (810, 80)}


def deployments(path):
    """The Serve deployments that the config's application consists of, by name."""
    (application,) = load(path)["applications"]
    module, _, function = application["import_path"].partition(":")
    app = call_user_app_builder_with_args_if_necessary(getattr(import_module(module), function), application["args"])
    built = build_serve_app(app, name=application["name"])
    return {deployment.name: deployment for deployment in built.deployments}, built.ingress_deployment_name


def test_there_is_a_config_for_every_example():
    assert [path.stem for path in CONFIGS] == [
        "laptop",
        "llama-405b-tp8-pp2",
        "llama-70b-tp8",
        "llama-8b",
        "sessions",
        "several-models",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_serve_and_octavo_both_know_every_key(path):
    values = load(path)
    (config,) = check_serve_config(values)
    (application,) = values["applications"]
    assert application["name"] == APP
    names = {INGRESS, *(engine_name(model) for model in config.models)}
    assert {override["name"] for override in application.get("deployments", [])} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_application_can_be_built(path):
    (config,) = check_serve_config(load(path))
    found, ingress = deployments(path)
    assert ingress == INGRESS
    assert set(found) == {INGRESS, *(engine_name(model) for model in config.models)}
    for model in config.models:
        assert gpus_of(found[engine_name(model)]) == (0 if model.engine.device == "cpu" else model.engine.num_ranks)


def gpus_of(deployment):
    replica = deployment._replica_config
    if replica.placement_group_bundles:
        return sum(bundle.get("GPU", 0) for bundle in replica.placement_group_bundles)
    return replica.ray_actor_options.get("num_gpus", 0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_holds_on_a_cluster(path):
    values = load(path)
    (config,) = check_serve_config(values)
    for model in config.models:
        # `auto` would ask the cluster, and an autoscaled one may have no GPU yet.
        assert model.engine.device != "auto"
        assert fits(model)
        limit = config.limits.request_timeout_s
        # A request is ended by its own deadline, never by the end of a drain.
        assert limit is None or limit <= config.ingress_drain_timeout_s
        assert limit is None or model.routing.failover_timeout_s <= limit
    if path.stem != "laptop":
        assert config.num_ingresses > 1
        assert config.limits.request_timeout_s is not None
        assert values["proxy_location"] == "EveryNode"


def fits(model: ModelConfig) -> bool:
    weights, memory = SIZES.get(model.engine.model, (0, 80))
    return weights / model.engine.num_ranks < 0.8 * memory


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_octavo_deploy_reads_it_too(path):
    assert [read_deployment(path)] == check_serve_config(load(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_exist(path):
    (config,) = check_serve_config(load(path))
    for model in config.models:
        preset = ROOT / "configs" / "models" / f"{model.engine.model}.yaml"
        assert "/" in model.engine.model or preset.exists(), model.engine.model
