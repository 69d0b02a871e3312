# shellcheck shell=bash
# What the launchers share; sourced by them.

dry_run=

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2:-2}"
}

say() {
    printf '== %s\n' "$*" >&2
}

# One argument as a shell would have to read it.
quote() {
    if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
        printf '%s' "$1"
    else
        printf '%s' "${1@Q}"
    fi
}

# A command line that a shell reads back as these arguments.
command_line() {
    local line='' argument
    for argument in "$@"; do
        line+="${line:+ }$(quote "$argument")"
    done
    printf '%s\n' "$line"
}

# Run a command, or with --dry-run print it.
run() {
    if [[ $dry_run ]]; then
        command_line "$@"
    else
        "$@"
    fi
}

need() {
    [[ $dry_run ]] || command -v "$1" > /dev/null || die "$1 is not installed; $2"
}

# gs://BUCKET/FOLDER or a path, else one line that says so.
check_workdir() {
    [[ $1 =~ ^gs://[a-z0-9][a-z0-9._-]+/.+ || $1 == /* ]] ||
        die "--workdir=$1: has to be gs://BUCKET/FOLDER, or the full path of a disk that all workers share"
}
