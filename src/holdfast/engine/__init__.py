"""Torch: base models, LoRA adapters, losses, optimizers, sampling, capture and restore."""
