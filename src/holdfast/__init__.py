"""Holdfast: a training service whose runs cannot be lost."""
