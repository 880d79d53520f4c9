"""The operators' pages name files, settings and defaults that exist."""

import dataclasses
import re

import pytest
from deployfiles import DEPLOY, ROOT, environment

from octavo.cluster.config import Autoscaling, DeploymentConfig, Limits, ModelConfig, Routing
from octavo.engine.config import EngineConfig

PAGES = [ROOT / "docs" / name for name in ("deploy.md", "operations.md")]
SECTIONS = {"autoscaling": Autoscaling, "engine": EngineConfig, "limits": Limits, "routing": Routing}
KINDS = (DeploymentConfig, ModelConfig, *SECTIONS.values())
SETTINGS = {item.name for kind in KINDS for item in dataclasses.fields(kind)}
# Serve's, Ray's and Kubernetes' own words.
OTHERS = {
    "file_mounts",
    "grpc_options",
    "http_options",
    "keep_alive_timeout_s",
    "metrics_report_interval_ms",
    "placement_group_bundle_label_selector",
    "placement_group_strategy",
}
SPANS = (ROOT / "cluster" / "observability" / "otlp.py").read_text()  # names their attributes and events
POLICY = (ROOT / "cluster" / "autoscaling_policy.py").read_text()
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@each_page
def test_files_exist(page):
    for name in re.findall(r"\b((?:deploy|docs|cluster|benchmarks)/[\w./-]*\w)", page.read_text()):
        assert (ROOT / name).exists(), name


@each_page
def test_settings_exist(page):
    words = re.findall(r"`(?:(\w+)\.)?([a-z]+(?:_[a-z0-9]+)+)(?:: [^`]*)?`", page.read_text())
    assert words
    for section, name in words:
        if section == "octavo":
            assert f'"octavo.{name}"' in SPANS, name
        elif name.startswith("ray_"):  # a metric, as Ray calls it
            assert f'"{name.removeprefix("ray_")}"' in POLICY, name
        elif section in SECTIONS:
            assert name in {item.name for item in dataclasses.fields(SECTIONS[section])}, f"{section}.{name}"
        else:
            assert name in SETTINGS | OTHERS, name


def test_defaults_are_those_of_the_code():
    text = (ROOT / "docs" / "operations.md").read_text()
    defaults = {item.name: item.default for kind in KINDS for item in dataclasses.fields(kind)}
    told = {
        name: float(deadline or given)
        for name, deadline, given in re.findall(r"`(?:\w+\.)?(\w+)` (?:\| (\d+) s|\((\d[\d.]*)\))", text)
        if name in defaults
    }
    assert len(told) >= 10
    assert told == {name: defaults[name] for name in told}


def test_ray_variables_are_in_the_environment_file():
    known = environment(DEPLOY / "ray" / "cluster.env").keys() | {"RAY_REDIS_ADDRESS"}
    for page in PAGES:
        assert set(re.findall(r"\bRAY_\w+[A-Za-z]", page.read_text())) <= known
