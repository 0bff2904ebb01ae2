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

# value_of OPTION ARGUMENTS: what a command line gives to an option, as `OPTION VALUE` or `OPTION=VALUE`; or nothing.
value_of() {
    local option=$1 previous="" argument value=""
    shift
    for argument in "$@"; do
        [[ $previous == "$option" ]] && value=$argument
        [[ $argument == "$option"=* ]] && value=${argument#"$option"=}
        previous=$argument
    done
    printf '%s\n' "$value"
}

# log_folder ARGUMENTS: where each process has its file: LOG_DIR, or logs in the --output of the run.
log_folder() {
    local output
    output=$(value_of --output "$@")
    [[ -n ${LOG_DIR:-}$output ]] || die "give --output FOLDER on the command line, or LOG_DIR in the environment"
    printf '%s\n' "${LOG_DIR:-$output/logs}"
}

# launch TOOL OPTIONS -- TOOL_OPTIONS: become the launcher of tools/TOOL (mindsigma/commands/launch.py), which lets msrun
# start the processes and watches them. SIGTERM and Ctrl-C are handed on to tools that save and end, as training does.
launch() {
    local tool=$root/tools/$1 options=() later=()
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    need_number RESTARTS "${RESTARTS:-0}" 0
    need_number HANG "${HANG:-1800}" 1
    [[ -z ${THEN:-} ]] || read -ra later <<< "--then $THEN"
    command -v python > /dev/null || die "python is not on the PATH; activate the environment of MindSpore"
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    exec python -m mindsigma.commands.launch "${options[@]}" --restarts "${RESTARTS:-0}" --hang "${HANG:-1800}" \
        "${later[@]}" -- "$tool" "$@"
}
