"""Bundled Detectron2-compatible detectors, inference only, and what feeds, builds and exports them.

Each detector has the parameter names and shapes of its Detectron2 counterpart and computes the
same. What needs no PyTorch (images as arrays, the model zoo) imports none.
"""
