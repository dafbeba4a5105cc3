"""Write a store in the current format under fixtures/, once for each format version.

Run: python -m tests.store.make_fixture. A fixture that is there is never changed.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from holdfast.store import Incomplete, LocalStore
from holdfast.store.model import FORMAT_VERSION
from tests.store.samples import CONFIG, OPTIMIZER, WEIGHTS, key_of, manifest_of

FIXTURES = Path(__file__).parent / "fixtures"


def main() -> None:
    root = FIXTURES / f"format-{FORMAT_VERSION}"
    if root.exists():
        sys.exit(f"{root} is there already")
    with LocalStore(root) as store:
        weights, config = store.put_blob([b"weights" * 9]), store.put_blob([b'{"r": 8}'])
        optimizer = store.put_blob([b"moments" * 20])
        training = manifest_of(
            {WEIGHTS: weights, CONFIG: config, OPTIMIZER: optimizer},
            expires=9e12,
            public=True,
            user_metadata={"Größe": "klein"},
            fingerprint={"torch": "2.6.0", "threads": 2, "deterministic": True, "x": 0.5},
            request_id="3f0c:train:0:7",
            pending_forward_backwards=2,
            incomplete=Incomplete(6, "out of memory"),
        )
        sampler = manifest_of({WEIGHTS: weights, CONFIG: config}, kind="sampler", optimizer=None)
        copy = replace(training, run="Other:RUN", name="Copy.1", parent=training.id)
        snapshot = replace(training, name=None, seq=9)
        for manifest in (training, sampler, copy):
            store.set_name(key_of(manifest), store.publish(manifest))
        store.publish(snapshot)
    for passing in ("fresh", "tmp", "pins"):
        shutil.rmtree(root / passing)
    for lock in root.glob("*.lock"):
        lock.unlink()
    kept = ("kind", "run", "name", "seq", "step", "expires", "public", "user_metadata")
    expected = {
        "names": {str(m.key): m.id for m in (training, sampler, copy)},
        "unnamed": [snapshot.id],
        "manifests": {
            m.id: {key: getattr(m, key) for key in kept}
            for m in (training, sampler, copy, snapshot)
        },
    }
    (root / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
