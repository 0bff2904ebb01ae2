#!/usr/bin/env bash
# Draw on the NPUs of one node. Written from msrun's documentation; it was not run on an NPU.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: [NPUS=8] [MASTER_PORT=8118] [LOG_DIR=outputs/logs] [RESTARTS=0] \
    tools/launch/generate_ascend.sh OPTIONS OF tools/generate.py

Give --parallel sequence, cfg (2 NPUs) or both (4, 6, ...), and the NPUs share each image; or --shard-prompts N, and each
draws shards of its own. NPUS defaults to all of the node (/dev/davinci*). What
process 0 writes is shown; each process writes worker_N.log below LOG_DIR.
USAGE
    exit 0
fi

npus=${NPUS:-$(find /dev -maxdepth 1 -name 'davinci[0-9]*' 2> /dev/null | wc -l)}
port=${MASTER_PORT:-8118}
[[ $npus != 0 ]] || die "no NPU found (/dev/davinci0); set NPUS, or use tools/launch/generate_cpu.sh"
need_number NPUS "$npus" 2
need_number MASTER_PORT "$port" 1024
[[ -n $(value_of --parallel "$@")$(value_of --shard-prompts "$@") ]] ||
    die "give --parallel sequence, cfg or both, or --shard-prompts N"

launch generate.py --processes "$npus" --port "$port" --logs "${LOG_DIR:-outputs/logs}" --bind-cores -- "$@" \
    --device Ascend
