"""Which series there are, and their labels: octavo's as its code exposes them, Ray's as its source defines them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
import ray
from prometheus_client.parser import text_string_to_metric_families

from octavo.cluster.observability.metrics import IngressMetrics, exposition
from octavo.cluster.observability.routing import RoutingMetrics
from octavo.engine.types import EngineStats

Series = dict[str, set[str]]  # name → labels
RAY = Path(ray.__file__).parent
SERVE = [*(RAY / "serve").glob("*.py"), *(RAY / "serve/_private").rglob("*.py")]
NODES = RAY / "dashboard/modules/reporter/reporter_agent.py"
AUTOSCALER = RAY / "autoscaler/_private/prom_metrics.py"
# What every series of a worker process carries, and what Serve adds to those of its replicas.
WORKER = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
REPLICA = {"application", "deployment", "replica"}
NODE = {"ip", "SessionName", "Version", "IsHeadNode", "RayNodeType", "GpuIndex", "GpuDeviceName"}
SCRAPED = {"job", "instance"}
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def octavo_series() -> Series:
    routing = RoutingMetrics("m")
    metrics = IngressMetrics("m", 4096, (routing.registry,))
    found: Series = {}
    for registry in (metrics.registry, routing.registry):
        for collector, names in registry._collector_to_names.items():
            for name in names:
                bucket = {"le"} if name.endswith("_bucket") else set()
                found[name] = {"ingress", "model_name", *collector._labelnames} | bucket
    text = exposition([(metrics, {"replica": EngineStats()})]).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # The same through Ray's agent, which gets the engines' numbers from the replicas.
    for name, labels in tuple(found.items()):
        through_ray = {"replica" if label == "engine" else label for label in labels}
        found[name.replace("octavo:", "ray_octavo_")] = through_ray | WORKER
    return {name: labels | SCRAPED for name, labels in found.items()}


def ray_series() -> Series:
    found: Series = {"up": set(SCRAPED)}
    for path in SERVE:
        for name, kind, tags in _definitions(path):
            if name.startswith("serve_"):
                _add(found, f"ray_{name}", kind, tags | WORKER | REPLICA)
    for name, kind, _ in _definitions(NODES):
        _add(found, f"ray_{name}", kind, NODE)
    for name, kind, _ in _definitions(AUTOSCALER):
        _add(found, f"autoscaler_{name}", kind, {"SessionName", "resource"})
    return found


def _add(found: Series, name: str, kind: str, labels: set[str]) -> None:
    name = name.removesuffix("_total") if kind == "Counter" else name
    for suffix in SUFFIXES[kind]:
        found.setdefault(name + suffix, set()).update(labels | SCRAPED | ({"le"} if suffix == "_bucket" else set()))


def _definitions(path: Path) -> Iterator[tuple[str, str, set[str]]]:
    """(name, kind, labels) of each `Counter("name", …, tag_keys=(…))`, or Gauge or Histogram, in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        kind = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if kind not in SUFFIXES:
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        named = node.args[0] if node.args else keywords.get("name")
        tags = {constant.value for constant in ast.walk(keywords.get("tag_keys", node.func)) if _is_text(constant)}
        for name in _texts(named):
            yield name, kind, tags


def _texts(node: ast.AST | None) -> list[str]:
    """The string that an expression is; both protocols' where the protocol is put into it."""
    if node is not None and _is_text(node):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        return ["".join(parts).format(protocol) for protocol in ("http", "grpc") if parts.count("{}") == 1]
    return []


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def uses(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(series, labels that must be on it) of a PromQL expression. Raises ValueError if it is none.

    Labels by which a result is grouped or matched must be on all series below.
    """
    yield from _walk(promql.parse(expression), set())


def _walk(node: promql.Expr, wanted: set[str]) -> Iterator[tuple[str, set[str]]]:
    match node:
        case promql.VectorSelector():
            assert node.name, "a selector without a name"
            yield node.name, wanted | {matcher.name for matcher in node.matchers.matchers}
        case promql.MatrixSelector():
            yield from _walk(node.vector_selector, wanted)
        case promql.AggregateExpr():
            # What stands above an aggregation sees only the labels that it keeps.
            kept = set(node.modifier.labels) if node.modifier else set()
            assert node.modifier is None or node.modifier.type == promql.AggModifierType.By
            assert wanted <= kept, f"{wanted - kept} is aggregated away"
            yield from _walk(node.expr, kept)
        case promql.BinaryExpr():
            matching = node.modifier.matching if node.modifier else None
            on = set(matching.labels) if matching and matching.type == promql.LabelModifierType.Include else set()
            yield from _walk(node.lhs, wanted | on)
            yield from _walk(node.rhs, on or wanted)  # without `on`, both sides must agree in all labels
        case promql.Call():
            for argument in node.args:
                needs_le = node.func.name == "histogram_quantile" and not isinstance(argument, promql.NumberLiteral)
                yield from _walk(argument, wanted | ({"le"} if needs_le else set()))
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _walk(node.expr, wanted)
        case promql.NumberLiteral() | promql.StringLiteral():
            return
        case _:
            raise AssertionError(f"unknown node {type(node).__name__}")
