#!/usr/bin/env bash
# Train on the NPUs of several nodes; run it on each. Written from msrun's documentation; it was not run on an NPU.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat << 'USAGE'
usage: NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [NPUS=8] [MASTER_PORT=8118] [TIMEOUT=600] [LOG_DIR=RUN/logs] \
       tools/launch/train_ascend_multi_node.sh OPTIONS OF tools/train.py

Run it on every node with the same options and its own NODE_RANK, 0 on the node of MASTER_ADDR. Each node has NPUS
processes, by default its number of /dev/davinci*; all nodes must have equally many. --output is a folder that all nodes
share, and the data are seen by all. The nodes wait TIMEOUT seconds for each other. kill -TERM of this script on any
node saves and ends all.

RESTARTS=3 in the environment starts the run again from its last checkpoint, up to three times, when a process dies or
when none takes a step for HANG (1800) seconds, which must be longer than the first step with its compilation. Give
it on every node; the launchers tell each other of faults by files in LOG_DIR, which all nodes share, and a restart takes
the next port.

TOOL=distill.py in the environment starts tools/distill.py with its options instead.
USAGE
    exit 0
fi

nodes=${NODES:-}
rank=${NODE_RANK:-}
address=${MASTER_ADDR:-}
npus=${NPUS:-$(find /dev -maxdepth 1 -name 'davinci[0-9]*' 2> /dev/null | wc -l)}
tool=${TOOL:-train.py}
port=${MASTER_PORT:-8118}
timeout=${TIMEOUT:-600}
[[ -n $nodes && -n $rank && -n $address ]] || die "set NODES, NODE_RANK and MASTER_ADDR; --help tells more"
[[ $npus != 0 ]] || die "no NPU found (/dev/davinci0); set NPUS"
need_number NODES "$nodes" 1
need_number NODE_RANK "$rank" 0
((10#$rank < 10#$nodes)) || die "NODE_RANK is $rank, it counts from 0 to $((nodes - 1))"
need_number NPUS "$npus" 1
need_number MASTER_PORT "$port" 1024
need_number TIMEOUT "$timeout" 1
logs=$(log_folder "$@")

launch "$tool" --processes "$npus" --nodes "$nodes" --node-rank "$rank" --address "$address" --port "$port" \
    --timeout "$timeout" --logs "$logs" --bind-cores -- "$@" --device Ascend
