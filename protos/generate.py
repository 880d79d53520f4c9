"""Regenerates the modules beside the .proto files: `python -m octavo.protos.generate`. Needs grpcio-tools.

The .proto files import each other as `octavo/v1/…`, as any language's compiler expects with this folder as its root.
Python finds the generated modules in `octavo.protos.octavo.v1`, so their imports of each other are rewritten.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def generate(target: Path) -> list[Path]:
    """Write the generated modules below `target`, in the layout of this folder. Returns their paths relative to it."""
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("octavo/**/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *sources])
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}; its messages are above.")
    written = [path for source in sources for path in sorted(target.glob(source.removesuffix(".proto") + "_pb2*.py*"))]
    for path in written:
        text = path.read_text()
        for start in ("from octavo.v1 import", "import octavo.v1"):
            text = text.replace(f"\n{start}", f"\n{start.replace('octavo.v1', 'octavo.protos.octavo.v1')}")
        path.write_text(text)
    return [path.relative_to(target) for path in written]


if __name__ == "__main__":
    for name in generate(ROOT):
        sys.stdout.write(f"{name}\n")
