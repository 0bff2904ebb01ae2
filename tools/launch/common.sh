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

# log_folder ARGUMENTS: where msrun writes a file a process: LOG_DIR, or logs in the --output of the run.
log_folder() {
    local output
    output=$(value_of --output "$@")
    [[ -n ${LOG_DIR:-}$output ]] || die "give --output FOLDER on the command line, or LOG_DIR in the environment"
    printf '%s\n' "${LOG_DIR:-$output/logs}"
}

# launch TOOL MSRUN_OPTIONS -- TOOL_OPTIONS: msrun of tools/TOOL, which ends the other processes when one fails. SIGTERM
# is handed on to the processes, which (in training) save and end; msrun itself would leave them alone in the world.
launch() {
    local tool=tools/$1 options=() code=0 interrupted="" runner
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    command -v msrun > /dev/null || die "msrun is not on the PATH; activate the environment that MindSpore is installed in"
    command -v python > /dev/null || die "python is not on the PATH, which msrun starts; activate the environment"
    # In a session of its own, so that Ctrl-C reaches this script alone. In training the first one saves and ends.
    setsid msrun "${options[@]}" --join=True "$root/$tool" "$@" &
    runner=$!
    trap 'pkill -TERM -P "$runner" -f "$tool" || true' TERM
    trap 'if [[ $tool == tools/train.py && -z $interrupted ]]; then
              printf "%s\n" "ends after this step, which is saved; Ctrl-C again ends at once" >&2
              pkill -TERM -P "$runner" -f "$tool" || true
          else
              kill -INT "$runner" 2> /dev/null || true
          fi
          interrupted=yes' INT
    while kill -0 "$runner" 2> /dev/null; do
        code=0
        wait "$runner" || code=$?
    done
    [[ -z $interrupted ]] || exit 130
    return "$code"
}
