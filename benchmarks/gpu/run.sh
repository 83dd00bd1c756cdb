#!/usr/bin/env bash
# Everything about the GPU path that a machine without a card cannot prove, in under 10 minutes, without a network.
#
#   bash benchmarks/gpu/run.sh                          on the card: benchmarks/results/gpu/NAME.json and a row in README.md there
#   bash benchmarks/gpu/run.sh --device cpu             the same code on a tiny model, without a card; nothing is kept
#   bash benchmarks/gpu/run.sh --wheels FOLDER          first installs the wheels of wheels.txt from a folder, into .gpu-packages/
#   bash benchmarks/gpu/run.sh --bundle RUN/bundles/cuda-int4    under onnxruntime-gpu, instead of the newest of runs/*/bundles/cuda-*
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
if [ "${1:-}" = "--wheels" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target .gpu-packages "$2"/*.whl
    shift 2
fi
export PYTHONPATH="$PWD:$PWD/.gpu-packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "$PYTHON" -m benchmarks.gpu.run "$@"
