#!/usr/bin/env bash
# Draw on several processes of one CPU host; for trying things out. Run on a CPU (tests/test_parallel.py).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: [PROCESSES=2] [MASTER_PORT=8118] [LOG_DIR=outputs/logs] [RESTARTS=0] \
    tools/launch/generate_cpu.sh OPTIONS OF tools/generate.py

Give --parallel sequence, cfg (2 processes) or both (4, 6, ...), and the processes share each image; or --shard-prompts N,
and each draws shards of its own. What process 0 writes is shown; each process writes worker_N.log below LOG_DIR.
USAGE
    exit 0
fi

processes=${PROCESSES:-2}
port=${MASTER_PORT:-8118}
need_number PROCESSES "$processes" 2
need_number MASTER_PORT "$port" 1024
[[ -n $(value_of --parallel "$@")$(value_of --shard-prompts "$@") ]] ||
    die "give --parallel sequence, cfg or both, or --shard-prompts N"

launch generate.py --processes "$processes" --port "$port" --logs "${LOG_DIR:-outputs/logs}" -- "$@" --device CPU
