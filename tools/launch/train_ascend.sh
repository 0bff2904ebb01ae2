#!/usr/bin/env bash
# Train on the NPUs of one node. Written from msrun's documentation; it was not run on an NPU.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: [NPUS=8] [MASTER_PORT=8118] [LOG_DIR=RUN/logs] [RESTARTS=0] tools/launch/train_ascend.sh OPTIONS OF tools/train.py

NPUS defaults to all of the node (/dev/davinci*). The batch of a step is --batch-size x --accumulation x NPUS;
--zero 1, 2 or 3 divides states, gradients and weights. What process 0 writes is shown; each process writes worker_N.log
below LOG_DIR. kill -TERM of this script saves and ends, the same command goes on.

RESTARTS=3 in the environment starts the run again from its last checkpoint, up to three times, when a process dies or
when none takes a step for HANG (1800) seconds, which must be longer than the first step with its compilation. THEN="4 2"
lets the first restart have 4 processes and those after it 2, with more micro-batches, so that the batch stays.

TOOL=distill.py in the environment starts tools/distill.py with its options instead.
USAGE
    exit 0
fi

npus=${NPUS:-$(find /dev -maxdepth 1 -name 'davinci[0-9]*' 2> /dev/null | wc -l)}
tool=${TOOL:-train.py}
port=${MASTER_PORT:-8118}
[[ $npus != 0 ]] || die "no NPU found (/dev/davinci0); set NPUS, or use tools/launch/train_cpu.sh"
need_number NPUS "$npus" 1
need_number MASTER_PORT "$port" 1024
logs=$(log_folder "$@")

launch "$tool" --processes "$npus" --port "$port" --logs "$logs" --bind-cores -- "$@" --device Ascend
