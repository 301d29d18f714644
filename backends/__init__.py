"""Optimizers: one file, one class each. The contract is in backends/base.py."""

import os
import sys

# ONNX Runtime (since 1.29), OpenVINO and NNCF report their use to their makers unless told not to,
# from threads and processes beside the run that is timed. Nobody who measures has asked for that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenVINO and NNCF do without this package where it is not installed.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
