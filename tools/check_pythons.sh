#!/usr/bin/env bash
# A short real table on each of some Pythons: the requirement file installs there, and the suite runs.
#
#   tools/check_pythons.sh python3.11 python3.12 python3.13
#
# Environments and result files are left in the folder CHECK_PYTHONS (default: check_pythons).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${CHECK_PYTHONS:-check_pythons}
mkdir -p "$folder"
for python in "$@"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    environment=$folder/python$version
    echo "Python $version"
    [ -d "$environment" ] || "$python" -m venv "$environment"
    "$environment/bin/pip" install --quiet -r requirements.txt
    "$environment/bin/python" run_blade.py --model testRetinaNet testMaskRCNNFPN --precision fp32 \
        --weights synthetic --image-size 160x224 --iterations 10 --device cpu \
        --backend torchscript openvino onnxruntime --output "$folder/results$version" --rerun
    "$environment/bin/python" compare.py "$folder/results$version/results.json" \
        "$folder/results$version/results.json" > /dev/null
done
