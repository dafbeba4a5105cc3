"""The wire: JSON bodies, protobuf messages, `tinker://` paths, errors and their categories."""
