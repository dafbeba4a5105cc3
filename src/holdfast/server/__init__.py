"""The ASGI app: thin routes, one module per resource; authentication; settings."""
