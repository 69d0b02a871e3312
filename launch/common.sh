# shellcheck shell=bash
# What the launchers share; sourced by them.

dry_run=
((BASH_VERSINFO[0] >= 5)) || { echo "${0##*/}: needs bash 5 or newer, this is $BASH_VERSION" >&2; exit 2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2:-2}"
}

say() {
    printf '== %s\n' "$*" >&2
}

# A command line that a shell reads back as these arguments.
command_line() {
    local line='' word
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+="${line:+ }$word"
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

is_bucket_folder() {
    [[ $1 =~ ^gs://[a-z0-9][a-z0-9._-]+/.+ ]]
}

# gcloud's own setting, such as compute/zone; nothing where there is none.
setting() {
    [[ $dry_run ]] || gcloud config get-value "$1" 2> /dev/null || true
}

# fetch_bucket gs://BUCKET/FOLDER DIR CHECKPOINTS PROJECT: checkpoints too where CHECKPOINTS is not empty.
fetch_bucket() {
    local exclude=(--exclude='^checkpoints/.*')
    [[ ! $3 ]] || exclude=()
    run mkdir -p "$2"
    run gcloud storage rsync --recursive ${exclude[@]+"${exclude[@]}"} "$1" "$2" --project="$4"
}
