"""Reading the files under deploy/: YAML without surprises, environment files, Serve configs checked to the last key."""

from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from octavo.cluster.config import DeploymentConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMPORT_PATH = "octavo.cluster.app:build_app"


class _Strict(yaml.SafeLoader):
    """A key written twice is an error; YAML's own rule keeps the last one silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice in line {node.start_mark.line + 1}: {keys}"
        return super().construct_mapping(node, deep)


def load_all(path: Path) -> list[Any]:
    return [document for document in yaml.load_all(path.read_text(), _Strict) if document is not None]


def load(path: Path) -> Any:
    (document,) = load_all(path)
    return document


def loads(text: str) -> Any:
    return yaml.load(text, _Strict)


def environment(path: Path) -> dict[str, str]:
    """Of a file of NAME=value lines."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def check_serve_config(values: dict[str, Any]) -> list[DeploymentConfig]:
    """The deployments of a Serve config. Serve ignores keys that it does not know; here they are errors."""
    schema = ServeDeploySchema.model_validate(values)
    unknown = list(_unknown_keys(values, ServeDeploySchema, ""))
    assert unknown == []
    assert all(app.import_path == IMPORT_PATH for app in schema.applications)
    return [DeploymentConfig.from_mapping(app.args) for app in schema.applications]


def _unknown_keys(values: Any, kind: type[BaseModel], where: str) -> Any:
    for key, value in values.items():
        if key not in kind.model_fields:
            yield f"{where}{key}"
            continue
        inner = _models(kind.model_fields[key].annotation)
        for item in value if isinstance(value, list) else [value]:
            if inner and isinstance(item, dict):
                yield from _unknown_keys(item, inner[0], f"{where}{key}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (list, Union, UnionType):
        return [model for argument in get_args(annotation) for model in _models(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
