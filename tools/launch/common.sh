# What the launchers share; sourced, not run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# die TEXT: one line on stderr, exit code 2.
die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# need_number NAME VALUE LEAST: the variable NAME must be a whole number of at least LEAST.
need_number() {
    [[ $2 =~ ^[0-9]{1,5}$ ]] && ((10#$2 >= $3)) || die "$1 is '$2', it must be a whole number of at least $3"
}

# log_folder ARGUMENTS: where msrun writes a file a process: LOG_DIR, or logs in the --output of the run.
log_folder() {
    local previous="" argument folder=${LOG_DIR:-}
    for argument in "$@"; do
        [[ -z $folder && $previous == --output ]] && folder=$argument/logs
        [[ -z $folder && $argument == --output=* ]] && folder=${argument#--output=}/logs
        previous=$argument
    done
    [[ -n $folder ]] || die "give --output FOLDER on the command line, or LOG_DIR in the environment"
    printf '%s\n' "$folder"
}

# launch MSRUN_OPTIONS -- TRAIN_OPTIONS: msrun, which ends the other processes when one fails. SIGTERM is handed on to
# the processes, which save and end; msrun itself would leave them alone in the world.
launch() {
    local options=() code=0 interrupted="" runner
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    command -v msrun > /dev/null || die "msrun is not on the PATH; activate the environment that MindSpore is installed in"
    command -v python > /dev/null || die "python is not on the PATH, which msrun starts; activate the environment"
    msrun "${options[@]}" --join=True "$root/tools/train.py" "$@" &
    runner=$!
    trap 'pkill -TERM -P "$runner" -f tools/train.py || true' TERM
    trap 'interrupted=yes; kill -INT "$runner" 2> /dev/null || true' INT
    while kill -0 "$runner" 2> /dev/null; do
        code=0
        wait "$runner" || code=$?
    done
    [[ -z $interrupted ]] || exit 130
    return "$code"
}
