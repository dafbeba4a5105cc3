"""The generated protobuf module is what the .proto says, and lives beside the official one."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from tinker.proto import tinker_public_pb2 as official

from holdfast.protocol import tinker_public_pb2 as ours

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="needs grpcio-tools")
def test_the_checked_in_module_is_the_generators(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "generate-protobuf", tmp_path], check=True)
    for name in ("tinker_public_pb2.py", "tinker_public_pb2.pyi"):
        made = (tmp_path / "holdfast" / "protocol" / name).read_text()
        assert made == (ROOT / "src" / "holdfast" / "protocol" / name).read_text(), (
            f"{name} is not what scripts/generate-protobuf makes from the .proto: run it"
        )


def _fields(message: descriptor_pb2.DescriptorProto) -> dict[int, tuple[int, int, str]]:
    return {f.number: (f.type, f.label, f.type_name.rsplit(".", 1)[-1]) for f in message.field}


def test_numbers_and_types_agree_with_the_official_messages() -> None:
    theirs = descriptor_pb2.FileDescriptorProto()
    official.DESCRIPTOR.CopyToProto(theirs)
    mine = descriptor_pb2.FileDescriptorProto()
    ours.DESCRIPTOR.CopyToProto(mine)
    official_messages = {m.name: m for m in theirs.message_type}
    assert len(mine.message_type) >= 20
    for message in mine.message_type:
        assert _fields(message) == _fields(official_messages[message.name]), message.name
    official_enums = {e.name: {v.number for v in e.value} for e in theirs.enum_type}
    for enum in mine.enum_type:
        assert {v.number for v in enum.value} == official_enums[enum.name]
