#!/usr/bin/env bash
# What a CUDA machine can tell in ten minutes, the most telling first: the tests that need CUDA, then
# RetinaNet, then the other test models. Inductor comes when three models are through, as it compiles
# for minutes. Whatever was done is in FOLDER after every step; called again, it goes on with what
# failed or was not reached.
#
# It has run on an NVIDIA H200 and an H100 (PyTorch 2.11): docs/performance.md.
#
#   tools/gpu_check.sh [FOLDER] [--device cpu]
#
# It installs nothing and needs no network. PYTHON is the interpreter (default: python3); WHEELS is a
# folder of wheels for what that lacks (msgspec, tabulate), which are unpacked into FOLDER.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=gpu_check
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    folder=$1
    shift
fi
device=cuda
if [ "${1:-}" = --device ]; then
    device=${2:?--device needs cpu or cuda}
fi
python=${PYTHON:-python3}
# Seconds; what has no time left is not started.
limit=${LIMIT:-500}
precisions=(fp32 fp16)
inductor=(fp16)
# Of rounds, for each model and precision; RetinaNet's processes are started anew between them.
budget=(--generations 1 --time-budget 10)
generations=(--time-budget 30)
if [ "$device" = cpu ]; then
    # That nothing fails for a typo is all that a CPU can tell.
    precisions=(fp32)
    inductor=(fp32)
    budget=(--image-size 96x128 --iterations 5 --warmup 1)
    generations=(--generations 3 --iterations 6)
fi

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
log=$folder/log.txt
start=$SECONDS

say() { echo "[$((SECONDS - start)) s] $*" | tee -a "$log"; }

# Runs a step: its name, then the command. Its output is in FOLDER/NAME.txt.
step() {
    local name=$1
    shift
    if [ -e "$folder/$name.done" ]; then
        say "$name: done before"
        return
    fi
    local left=$((limit - SECONDS + start))
    if [ "$left" -lt 20 ]; then
        say "$name: no time left"
        return
    fi
    say "$name: $*"
    timeout --signal INT --kill-after 10 "$left" "$@" > "$folder/$name.txt" 2>&1
    local code=$?
    say "$name: exit code $code"
    if [ "$code" = 0 ]; then
        touch "$folder/$name.done"
    fi
    tail -n 3 "$folder/$name.txt" | tee -a "$log"
}

if [ -n "${WHEELS:-}" ]; then
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$folder/packages"
    done
    export PYTHONPATH="$folder/packages${PYTHONPATH:+:$PYTHONPATH}"
fi

# Measures a test model: the step's name, the model's, backends, precisions and further options.
measure() {
    local name=$1 model=$2 backends
    read -ra backends <<< "$3"
    shift 3
    # The last of an option counts, and there is no way to take one back.
    local limits=("${budget[@]}")
    if [ "$name" = testRetinaNet ]; then
        limits=("${generations[@]}")
    fi
    step "$name" "$python" run_blade.py --model "$model" --device "$device" \
        --weights synthetic --backend "${backends[@]}" "${limits[@]}" \
        --coverage --costs --debug --output "$folder/$name" --precision "$@"
}

# Runs tests that need CUDA: the step's name, then arguments of pytest.
tests() {
    local name=$1
    shift
    if [ "$device" = cpu ]; then
        set -- "$@" --collect-only -q
    fi
    step "$name" "$python" -m pytest -p no:cacheprovider -o addopts= --show-capture=no --tb=short -ra \
        -m cuda "$@"
}

step machine "$python" - << 'PYTHON'
import platform, torch, torchvision
print(platform.python_version(), torch.__version__, torchvision.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device")
PYTHON
step list "$python" run_blade.py --list --device "$device"
tests tests -k "not inductor"
eager="torch_channels_last torchscript"
measure testRetinaNet testRetinaNet "$eager" "${precisions[@]}"
measure testRetinaNet_no_tf32 testRetinaNet "$eager" fp32 --no-tf32
measure testMaskRCNNFPN testMaskRCNNFPN "$eager" "${precisions[@]}"
measure testRetinaNet_inductor testRetinaNet inductor "${inductor[@]}"
for model in testCascadeRCNN testMaskRCNNC4 testMaskRCNNFPN_b2 testMaskRCNNFPN_pproc testRetinaNet_scripted; do
    measure "$model" "$model" "$eager" "${precisions[@]}"
done
tests tests_inductor -k inductor
say "done"
