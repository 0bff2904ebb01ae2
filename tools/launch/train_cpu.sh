#!/usr/bin/env bash
# Train on several processes of one CPU host; for trying things out. Run on a CPU (tests/test_training_distributed.py).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: [PROCESSES=2] [MASTER_PORT=8118] [LOG_DIR=RUN/logs] tools/launch/train_cpu.sh OPTIONS OF tools/train.py

The batch of a step is --batch-size x --accumulation x PROCESSES. What process 0 writes is shown; each process writes
worker_N.log below LOG_DIR. kill -TERM of this script saves and ends, the same command goes on. If a process dies, the
others are killed at once; msrun itself takes some 40 seconds to end.

TOOL=distill.py in the environment starts tools/distill.py with its options instead.
USAGE
    exit 0
fi

processes=${PROCESSES:-2}
tool=${TOOL:-train.py}
port=${MASTER_PORT:-8118}
need_number PROCESSES "$processes" 1
need_number MASTER_PORT "$port" 1024
logs=$(log_folder "$@")

launch "$tool" --worker_num="$processes" --local_worker_num="$processes" --master_port="$port" --log_dir="$logs" \
    --tail_worker_log=0 -- "$@" --device CPU
