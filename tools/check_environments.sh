#!/usr/bin/env bash
# Backends of two other environments in one table: an older OpenVINO, and TorchScript of the oldest
# Python and PyTorch that a worker runs on.
#
#   tools/check_environments.sh PYTHON3.8 [arguments of run_blade.py]
#
# Run it with the suite's environment active. The other environments are left in the folder
# CHECK_ENVIRONMENTS (default: check_environments).
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=${1:?the path of a Python 3.8 to 3.10}
shift
folder=${CHECK_ENVIRONMENTS:-check_environments}
mkdir -p "$folder"
if [ ! -d "$folder/torch2.0" ]; then
    "$oldest" -m venv "$folder/torch2.0"
    "$folder/torch2.0/bin/pip" install --quiet torch==2.0.1 torchvision==0.15.2 "numpy<2"
fi
if [ ! -d "$folder/openvino2025" ]; then
    python3 -m venv "$folder/openvino2025"
    # It shares the suite's PyTorch.
    python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        > "$(echo "$folder"/openvino2025/lib/python*/site-packages)/zz_shared.pth"
    "$folder/openvino2025/bin/pip" install --quiet --no-deps openvino==2025.4.1
fi
python3 run_blade.py --model testRetinaNet --precision fp32 --device cpu \
    --backend torchscript openvino \
    --environment "openvino@2025=$folder/openvino2025/bin/python" \
    --environment "torchscript@torch2.0=$folder/torch2.0/bin/python" "$@"
