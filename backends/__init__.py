"""Optimizers: one file, one class each. The contract is in backends/base.py."""
