"""Shapes: what models look like, by name, without their weights: the folders of configs/shapes/, a config.json each."""

from __future__ import annotations

from pathlib import Path

import octavo.configs


def shape_folders() -> dict[str, Path]:
    """By name. Imports no torch."""
    # Not importlib.resources: see octavo.engine.loader.presets.
    folders = [Path(folder) / "shapes" for folder in octavo.configs.__path__]
    return {file.parent.name: file.parent for folder in folders for file in sorted(folder.glob("*/config.json"))}
