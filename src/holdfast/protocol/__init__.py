"""The wire: JSON models, protobuf messages, tinker:// paths, errors and their categories."""
