#!/usr/bin/env bash
# Train on several processes of one CPU host; for trying things out. Run on a CPU (tests/test_training_distributed.py).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: [PROCESSES=2] [MASTER_PORT=8118] [LOG_DIR=RUN/logs] [RESTARTS=0] tools/launch/train_cpu.sh OPTIONS OF tools/train.py

The batch of a step is --batch-size x --accumulation x PROCESSES. What process 0 writes is shown; each process writes
worker_N.log below LOG_DIR. kill -TERM of this script saves and ends, the same command goes on. If a process dies, the
others are killed at once.

RESTARTS=3 in the environment starts the run again from its last checkpoint, up to three times, when a process dies or
when none takes a step for HANG (1800) seconds, which must be longer than the first step with its compilation. THEN="4 2"
lets the first restart have 4 processes and those after it 2, with more micro-batches, so that the batch stays.

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

launch "$tool" --processes "$processes" --port "$port" --logs "$logs" -- "$@" --device CPU
