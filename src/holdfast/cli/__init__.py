"""The commands: serve, quickstart, run, checkpoint, doctor."""
