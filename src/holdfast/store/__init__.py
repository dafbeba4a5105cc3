"""The durable checkpoint store: blobs, manifests, names, verification, garbage collection."""
