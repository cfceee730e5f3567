"""Post-training of Mixture-of-Experts models: SFT and cascaded on-policy distillation."""

__version__ = "0.1.0"
