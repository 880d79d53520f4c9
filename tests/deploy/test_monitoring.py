"""Scrape settings, alerts and dashboards: the PromQL is PromQL, every series exists and has the labels asked of it."""

import json
import re

import pytest
from deployfiles import DEPLOY, load
from metric_names import octavo_series, ray_series, uses

ALERTS = [rule for group in load(DEPLOY / "prometheus" / "alerts.yml")["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana" / "octavo.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$model": "m", "$datasource": "prometheus"}


@pytest.fixture(scope="module")
def series():
    return {**ray_series(), **octavo_series()}


def check(expression, series):
    for name, labels in uses(expression):
        assert name in series, f"{name} does not exist"
        assert labels <= series[name], f"{name} has no label {labels - series[name]}"


def expanded(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_the_catalogue_knows_what_has_been_seen(series):
    """Series and labels of a cluster that ran (Ray 2.60, HAProxy, one engine)."""
    seen = {
        "ray_serve_num_http_requests_total": {"application", "method", "route", "status_code"},
        "ray_serve_deployment_replica_healthy": {"application", "deployment", "replica"},
        "ray_serve_autoscaling_target_replicas": {"application", "deployment"},
        "ray_serve_replica_startup_latency_ms_count": {"application", "deployment"},
        "ray_serve_num_ongoing_http_requests": {"node_id", "node_ip_address"},
        "ray_serve_haproxy_process_count": {"node_id"},
        "ray_node_mem_used": {"ip", "IsHeadNode", "RayNodeType"},
        "octavo:time_to_first_token_seconds_bucket": {"ingress", "model_name", "le"},
        "octavo:num_requests_running": {"engine", "model_name"},
        "octavo:engine_steps_total": {"engine", "model_name"},
        "autoscaler_pending_nodes": set(),
    }
    assert {name for name in seen if name not in series} == set()
    assert {name for name, labels in seen.items() if not labels <= series[name]} == set()


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("octavo:no_such_thing", "does not exist"),
        ('octavo:num_requests_running{engines="0"}', "has no label"),
        ("sum by (route) (octavo:num_requests_running)", "has no label"),
        ("histogram_quantile(0.9, sum by (model_name) (octavo:time_to_first_token_seconds_bucket))", "aggregated away"),
        ("octavo:num_preemptions", "does not exist"),
    ],
)
def test_the_check_finds_faults(expression, complaint, series):
    with pytest.raises(AssertionError, match=complaint):
        check(expression, series)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts(rule, series):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    check(rule["expr"], series)
    assert rule["labels"]["severity"] in ("page", "ticket")
    said = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    kept = set.intersection(*(labels | {"instance"} for _, labels in uses(rule["expr"])))
    assert said <= kept


def test_alerts_are_explained():
    text = (DEPLOY.parent / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in ALERTS if rule["alert"] not in text] == []


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels(panel, series):
    assert panel["targets"]
    for target in panel["targets"]:
        expression = expanded(target["expr"])
        check(expression, series)
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for _, labels in uses(expression):
            assert shown <= labels | {"le"}


def test_the_dashboard_fits_together():
    assert DASHBOARD["schemaVersion"] >= 39
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    (model,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "model")
    assert model["query"] == "label_values(octavo:num_requests_running, model_name)"


def test_scraping():
    config = load(DEPLOY / "prometheus" / "prometheus.yml")
    assert set(config) <= {"global", "rule_files", "scrape_configs"}
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert set(jobs) == {"octavo", "ray"}
    # Several addresses would bring the same series several times.
    assert [len(group["targets"]) for group in jobs["octavo"]["static_configs"]] == [1]
    assert all((DEPLOY / "prometheus" / file).exists() for file in config["rule_files"])
