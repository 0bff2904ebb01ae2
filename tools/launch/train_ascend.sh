#!/usr/bin/env bash
# Train on the NPUs of one node. Written from msrun's documentation; it was not run on an NPU.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: [NPUS=8] [MASTER_PORT=8118] [LOG_DIR=RUN/logs] tools/launch/train_ascend.sh OPTIONS OF tools/train.py

NPUS defaults to all of the node (/dev/davinci*). The batch of a step is --batch-size x --accumulation x NPUS;
--zero 1 divides the optimiser's states. What process 0 writes is shown; each process writes worker_N.log below LOG_DIR.
kill -TERM of this script saves and ends, the same command goes on.

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

launch "$tool" --worker_num="$npus" --local_worker_num="$npus" --master_port="$port" --log_dir="$logs" --bind_core=True \
    --tail_worker_log=0 -- "$@" --device Ascend
