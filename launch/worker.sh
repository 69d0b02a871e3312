#!/usr/bin/env bash
# What runs on the machine that trains: a worker of a TPU VM (called over ssh by tpu_vm.sh) or a container (its
# entry point on GKE and Vertex AI).
set -euo pipefail

usage() {
    cat <<'END'
bash launch/worker.sh COMMAND ...

  install [EXTRA]         a Python environment with all requirements and jax[EXTRA] (default tpu) in ~/starflow_env
  run WORKDIR [FLAGS]     train (or what --mode says) in the foreground; FLAGS are those of starflow_jax.main, and may
                          name gs://BUCKET/... too
  start WORKDIR [FLAGS]   the same in the background, over the end of this connection
  status                  one word: none, running, gone (killed without an exit code), or the job's exit code
  follow [LINES]          print the log from LINES before its end (default: all of it) until the job ends
  stop [SECONDS]          tell the job to save and end; kill it if it has not within SECONDS (default 300)
  pack WORKDIR [all]      ~/starflow_results.tar.gz from WORKDIR, checkpoints only with "all"

WORKDIR is a folder that all workers see, or gs://BUCKET/FOLDER: the bucket is then mounted by Cloud Storage FUSE.
Exit codes of `run`: the program's own; 143 when it was ended from outside (a preemption); 130 by `stop`.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
job=${STARFLOW_JOB:-$HOME/starflow_job}
environment=${STARFLOW_ENV:-$HOME/starflow_env}

die() {
    printf 'worker.sh: %s\n' "$1" >&2
    exit "${2:-2}"
}

install() {
    local extra=${1:-tpu}
    # TPU VM images carry Python 3.10, jax needs 3.11. uv brings its own Python: no root, no package lock held by the
    # image's unattended upgrades, the same build on every worker. (deadsnakes needs both; conda is a gigabyte.)
    export PATH="$HOME/.local/bin:$PATH"
    if ! command -v uv > /dev/null; then
        python3 -m pip install --quiet --user uv 2> /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    fi
    [[ -x $environment/bin/python ]] || uv venv --quiet --python "${PYTHON:-3.12}" "$environment"
    cd "$root"
    uv pip install --quiet --python "$environment/bin/python" --requirement requirements.txt "jax[$extra]"
    printf 'installed on %s\n' "$(hostname)"
}

# The local path of a workdir. A bucket is mounted without caches: the workers have to see each other's files at once.
local_path() {
    local workdir=$1 bucket folder mount
    if [[ $workdir != gs://* ]]; then
        printf '%s\n' "$workdir"
        return
    fi
    bucket=${workdir#gs://}
    folder=${bucket#"${bucket%%/*}"}
    bucket=${bucket%%/*}
    mount=$HOME/buckets/$bucket
    if ! mountpoint --quiet "$mount"; then
        command -v gcsfuse > /dev/null || install_gcsfuse >&2 || return
        mkdir -p "$mount"
        gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
            --rename-dir-limit=200000 "$bucket" "$mount" >&2 || die "gs://$bucket can't be mounted" 1
    fi
    printf '%s\n' "$mount$folder"
}

# FLAG with the local folder of each bucket that it names.
local_flag() {
    local flag=$1 bucket folder
    while [[ $flag =~ gs://([^/,]+) ]]; do
        bucket=${BASH_REMATCH[1]}
        folder=$(local_path "gs://$bucket") || return
        flag=${flag//"gs://$bucket"/"$folder"}
    done
    printf '%s\n' "$flag"
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc
    # Fresh images upgrade themselves in the background and hold apt's lock for minutes.
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null &&
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null &&
        sudo apt-get -o DPkg::Lock::Timeout=900 update -qq &&
        sudo apt-get -o DPkg::Lock::Timeout=900 install -qq --yes gcsfuse
}

run() {
    (($#)) || die "run: WORKDIR is missing; see --help"
    local workdir python=python3 code=0 flag flags=()
    workdir=$(local_path "$1") || return
    shift
    for flag in "$@"; do
        flag=$(local_flag "$flag") || return
        flags+=("$flag")
    done
    [[ ! -x $environment/bin/python ]] || python=$environment/bin/python
    cd "$root" || return
    terminated=
    # The program saves and ends with 0 when it is told to stop; whoever restarts it must not take that for its end.
    trap 'terminated=1; kill -TERM "$child" 2> /dev/null || true' TERM
    # On a TPU the other workers' processes are found; elsewhere FLAGS say where they are.
    local tpu=()
    [[ ! -e /dev/accel0 && ! -e /dev/vfio/0 ]] || tpu=(--distributed=true)
    PYTHONUNBUFFERED=1 "$python" -m starflow_jax.main --workdir="$workdir" "${tpu[@]}" "${flags[@]}" &
    child=$!
    while kill -0 "$child" 2> /dev/null; do
        code=0
        wait "$child" || code=$?
    done
    [[ -z $terminated ]] || code=143
    [[ -z $terminated || ! -e $job/stopped ]] || code=130
    return "$code"
}

# The process that `start` leaves behind: it runs the job, keeps a copy of the log with the results, and then says how
# it ended.
supervise() {
    local code=0 logs
    run "$@" || code=$?
    if logs="$(local_path "$1")/logs" && mkdir -p "$logs"; then
        cp "$job/log" "$logs/$(hostname).log" || true
    fi
    echo "$code" > "$job/exit_code.partial"
    mv "$job/exit_code.partial" "$job/exit_code"
}

running() {
    # Not by the number alone: after a reboot it may be another process's.
    [[ -e $job/pid ]] && grep --quiet --no-messages --text supervise "/proc/$(cat "$job/pid")/cmdline"
}

start() {
    (($#)) || die "start: WORKDIR is missing; see --help"
    local command
    command=$(printf '%q ' "$@")
    mkdir -p "$job"
    if running; then
        [[ $(cat "$job/command") == "$command" ]] || die "another job is running on $(hostname): stop it first" 1
        echo "already running on $(hostname)"
        return
    fi
    rm -f "$job/exit_code" "$job/stopped"
    printf '%s' "$command" > "$job/command"
    STARFLOW_JOB=$job STARFLOW_ENV=$environment setsid nohup bash "$root/launch/worker.sh" supervise "$@" \
        > "$job/log" 2>&1 < /dev/null &
    echo $! > "$job/pid"
    echo "started on $(hostname)"
}

status() {
    if running; then
        echo running
    elif [[ -e $job/exit_code ]]; then
        cat "$job/exit_code"
    elif [[ -e $job/stopped ]]; then
        echo 130 # by force
    elif [[ -e $job/pid ]]; then
        echo gone
    else
        echo none
    fi
}

# A number that bash arithmetic and `tail` may see: nothing else is evaluated there.
check_number() {
    [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$1=$2: must be a whole number"
}

follow() {
    [[ -z ${1:-} ]] || check_number 'follow: LINES' "$1"
    [[ -e $job/pid ]] || die "no job was started on $(hostname)" 1
    tail --lines="${1:-+1}" --follow --sleep-interval=0.5 --pid="$(cat "$job/pid")" "$job/log"
}

stop() {
    check_number 'stop: SECONDS' "${1:-300}"
    running || return 0
    touch "$job/stopped"
    kill -TERM "$(cat "$job/pid")"
    local seconds
    for ((seconds = 0; seconds < ${1:-300}; seconds++)); do
        sleep 0.2
        running || return 0
        sleep 0.8
    done
    kill -KILL -- "-$(cat "$job/pid")" # setsid made it the leader of its group
}

pack() {
    (($#)) || die "pack: WORKDIR is missing; see --help"
    local exclude=(--exclude=./checkpoints)
    [[ ${2:-} != all ]] || exclude=()
    tar --create --gzip --file="$HOME/starflow_results.tar.gz" "${exclude[@]}" --directory="$1" .
}

case ${1:-} in
    install | run | start | status | follow | stop | pack | supervise) "$@" ;;
    -h | --help) usage ;;
    '') die "no command; see --help" ;;
    *) die "$1: no such command; see --help" ;;
esac
