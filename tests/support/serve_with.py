"""Serves with settings that have no flag: `python -m tests.support.serve_with JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from holdfast.runs.service import Lifetimes
from holdfast.server.serve import serve
from holdfast.server.settings import ModelSource, Settings, shipped_model


def main(text: str) -> None:
    values = json.loads(text)
    values["data_dir"] = Path(values["data_dir"])
    values["lifetimes"] = Lifetimes(**values.get("lifetimes", {}))
    models = {name: ModelSource(path) for name, path in values["models"].items()}
    name, shipped = shipped_model()
    values["models"] = {**models, name: shipped}
    serve(Settings(**values))


if __name__ == "__main__":
    main(sys.argv[1])
