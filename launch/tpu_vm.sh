#!/usr/bin/env bash
# Trains on a Cloud TPU VM, one host or a pod, and resumes after preemptions.
set -euo pipefail

usage() {
    cat <<'END'
bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS]

FLAGS are those of python -m starflow_jax.main, without --workdir.

Commands
  launch   all of it: create, install, start, log; after a preemption again, from the last checkpoint; fetch at the
           end. Given again while the job runs, it only follows it. Its exit code is the job's.
  create   create the TPU VM, or take the one of this name; delete and create one that was preempted
  install  copy this checkout to all workers and install what it needs
  start    start FLAGS on all workers, in the background
  log      follow the log of worker 0 to the job's end; the exit code is the job's
  status   the TPU's state and the job's
  tunnel   http://localhost:PORT here is what --mode=serve, as the job, serves there; until Ctrl-C
  stop     tell the job to save and end
  fetch    copy the results here
  delete   delete the TPU VM and its queued resource

Options
  --name=NAME              of the TPU VM (and of its queued resource)
  --zone=ZONE              such as us-east5-a; default: gcloud's compute/zone
  --project=PROJECT        default: gcloud's project
  --type=TYPE              accelerator type, such as v5p-128 or v6e-256
  --runtime=VERSION        default: the one for the type
  --workdir=DIR            gs://BUCKET/FOLDER, or a path on a disk that all workers share: checkpoints and results
  --spot | --preemptible | --reserved   default: on demand
  --queue                  ask by a queued resource and wait for it
  --valid-until-duration=D with --queue: give up after, such as 6h
  --create-flag=FLAG       passed to gcloud's create, such as --create-flag=--network=NAME; may be repeated
  --results=DIR            where fetch puts results; default: runs/NAME
  --checkpoints            fetch checkpoints too
  --max-restarts=N         default 100
  --poll=SECONDS           between looks at the TPU's state; default 30
  --port=PORT              of the tunnel, at both ends; default 8000
  --delete                 launch: delete the TPU VM when the job has ended, well or not
  --dry-run                print what would be done, as if no TPU of this name existed, and do nothing
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' zone='' project='' type='' runtime='' workdir='' capacity='' queue='' valid_until='' results=''
checkpoints='' max_restarts=100 poll=30 port=8000 delete_at_end=''
create_flags=() job_flags=()
created='' # this run created the TPU
ended=''   # how the job ended: its exit code, gone (killed without one), or lost (the workers can't be reached)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exec 3>&1 # for what is printed inside $(...)

parse() {
    while (($#)); do
        case $1 in
            --name=?*) name=${1#*=} ;;
            --zone=?*) zone=${1#*=} ;;
            --project=?*) project=${1#*=} ;;
            --type=?*) type=${1#*=} ;;
            --runtime=?*) runtime=${1#*=} ;;
            --workdir=?*) workdir=${1#*=} ;;
            --spot | --preemptible | --reserved)
                [[ ! $capacity ]] || die "$capacity and $1: only one of them"
                capacity=$1
                ;;
            --queue) queue=1 ;;
            --valid-until-duration=?*) valid_until=$1 ;;
            --create-flag=--?*) create_flags+=("${1#*=}") ;;
            --results=?*) results=${1#*=} ;;
            --checkpoints) checkpoints=all ;;
            --max-restarts=?*) max_restarts=${1#*=} ;;
            --poll=?*) poll=${1#*=} ;;
            --port=?*) port=${1#*=} ;;
            --delete) delete_at_end=1 ;;
            --dry-run) dry_run=1 ;;
            --)
                shift
                job_flags=("$@")
                return
                ;;
            *) die "$1: not an option (values are given as --name=NAME); see --help" ;;
        esac
        shift
    done
}

check() {
    need gcloud 'see https://cloud.google.com/sdk/docs/install'
    [[ $name ]] || die '--name is missing'
    [[ $zone ]] || zone=$(setting compute/zone)
    [[ $zone ]] || die '--zone is missing, and gcloud has no compute/zone set'
    [[ $project ]] || project=$(setting project)
    [[ $project ]] || die '--project is missing, and gcloud has no project set'
    [[ $max_restarts =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--max-restarts=$max_restarts: must be a number"
    [[ $poll =~ ^[0-9]+$ ]] || die "--poll=$poll: must be a number of seconds"
    [[ $port =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] || die "--port=$port: must be a number from 1 to 65535"
    [[ $queue || ! $valid_until ]] || die '--valid-until-duration needs --queue'
    [[ ! $queue || $capacity != --preemptible ]] || die '--queue takes no --preemptible; use --spot'
    case $command in
        launch | create) check_type ;;
    esac
    case $command in
        launch | start | fetch)
            [[ $workdir ]] || die '--workdir is missing: gs://BUCKET/FOLDER, or a path on a disk all workers share'
            is_bucket_folder "$workdir" || [[ $workdir == /* ]] ||
                die "--workdir=$workdir: must be gs://BUCKET/FOLDER, or the full path of a disk all workers share"
            ;;
    esac
    case $command in
        launch | start)
            [[ " ${job_flags[*]-}" == *' --config='* ]] || die 'no training flags: end with -- --config=configs/t2v.py'
            [[ " ${job_flags[*]}" != *' --workdir'* ]] || die '--workdir belongs before the --'
            ;;
    esac
    results=${results:-runs/$name}
}

check_type() {
    [[ $type ]] || die '--type is missing, such as --type=v5p-128'
    [[ ! $runtime ]] || return 0
    case $type in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v[234]-*) runtime=tpu-ubuntu2204-base ;;
        *) die "--type=$type: give its --runtime too (gcloud compute tpus tpu-vm versions list --zone=$zone)" ;;
    esac
}

tpu() {
    local verb=$1
    shift
    run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" --project="$project"
}

queued() {
    local verb=$1
    shift
    run gcloud compute tpus queued-resources "$verb" "$@" --zone="$zone" --project="$project"
}

# worker WHICH WORDS...: run worker.sh on worker 0, or on all.
worker() {
    local which=$1
    shift
    tpu ssh "$name" --worker="$which" --quiet --command="$(command_line bash starflow_jax/launch/worker.sh "$@")"
}

# state tpu|queued FIELD: one word; ABSENT where there is none, UNKNOWN (and why) where it can't be asked.
state() {
    local answer
    if [[ $dry_run ]]; then
        "$1" describe "$name" --format="value($2)" >&3
        echo ABSENT
    elif answer=$("$1" describe "$name" --format="value($2)" 2>&1); then
        printf '%s\n' "${answer##*$'\n'}"
    elif [[ $answer == *NOT_FOUND* || $answer == *'not found'* ]]; then
        echo ABSENT
    else
        say "$answer"
        echo UNKNOWN
    fi
}

tpu_state() {
    state tpu state
}

# Create the TPU, or take the one that is there. Returns 75 where there is no capacity for it, 1 where it can't be had
# for another reason, which has been shown.
create() {
    if [[ $queue ]]; then
        create_queued || return
    fi
    local seen='' now absent=0
    while true; do
        now=$(tpu_state)
        case $now in
            READY) return ;;
            ABSENT)
                if [[ $dry_run && $queue ]]; then return; fi
                if [[ $queue ]]; then
                    # Its queued resource was active a moment ago; it may be about to be suspended.
                    ((++absent <= 20)) || die "$name: its queued resource is active but there is no such TPU" 1
                    sleep "$poll"
                    create_queued || return
                else
                    create_node || return
                fi
                if [[ $dry_run ]]; then return; fi
                ;;
            PREEMPTED | TERMINATED)
                say "$name is $now: it is deleted and created again"
                delete || return
                if [[ $queue ]]; then
                    create_queued || return
                fi
                ;;
            STOPPED) tpu start "$name" || return ;;
            UNKNOWN) return 1 ;;
            *)
                [[ $now == "$seen" ]] || say "$name is $now; waiting"
                seen=$now
                sleep "$poll"
                ;;
        esac
    done
}

create_node() {
    created=1
    tpu create "$name" --accelerator-type="$type" --version="$runtime" ${capacity:+"$capacity"} \
        ${create_flags[@]+"${create_flags[@]}"} 2> "$scratch/errors" && return
    cat "$scratch/errors" >&2
    ! grep --quiet --ignore-case --extended-regexp 'capacity|resource_exhausted' "$scratch/errors" || return 75
    return 1
}

create_queued() {
    local seen='' now asked=''
    while true; do
        now=$(state queued state.state)
        case $now in
            ACTIVE) return ;;
            ABSENT)
                queued create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
                    ${capacity:+"$capacity"} ${valid_until:+"$valid_until"} \
                    ${create_flags[@]+"${create_flags[@]}"} || return
                asked=1 created=1
                if [[ $dry_run ]]; then return; fi
                ;;
            FAILED | SUSPENDED)
                # What failed before this run is old; what failed now would fail again.
                if [[ $asked ]]; then
                    say "the queued resource $name is $now"
                    return 1
                fi
                say "the queued resource $name is $now: it is deleted and asked for again"
                queued delete "$name" --force --quiet || return
                ;;
            UNKNOWN) return 1 ;;
            *)
                [[ $now == "$seen" ]] || say "the queued resource $name is $now; waiting"
                seen=$now
                sleep "$poll"
                ;;
        esac
    done
}

delete() {
    if [[ $dry_run ]]; then
        if [[ $queue ]]; then queued delete "$name" --force --quiet; else tpu delete "$name" --quiet; fi
    elif [[ ! $(state queued state.state) =~ ^(ABSENT|UNKNOWN)$ ]]; then
        queued delete "$name" --force --quiet
    elif [[ $(tpu_state) != ABSENT ]]; then
        tpu delete "$name" --quiet
    else
        say "there is no TPU VM and no queued resource $name"
    fi
}

install() {
    local archive=$scratch/starflow_jax.tar.gz root=${here%/*}
    # With what is not committed yet, without what git ignores.
    # shellcheck disable=SC2016 # expanded by the inner bash
    run bash -o pipefail -c 'cd "$1" && git ls-files -z --cached --others --exclude-standard | '\
'tar --create --gzip --null --files-from=- --ignore-failed-read --file="$2"' pack "$root" "$archive" ||
        die "$root can't be packed; it must be a git checkout" 1
    tpu scp "$archive" "$name:" --worker=all --quiet
    tpu ssh "$name" --worker=all --quiet --command='mkdir -p starflow_jax && tar -xzf starflow_jax.tar.gz '\
'-C starflow_jax && bash starflow_jax/launch/worker.sh install tpu'
}

start() {
    worker all start "$workdir" "${job_flags[@]}"
}

# none, running, gone or an exit code; lost where worker 0 can't be reached.
job_status() {
    local answer
    answer=$(worker 0 status 2> /dev/null | tail -n 1) || true
    printf '%s\n' "${answer:-lost}"
}

# Follow the log until the job has ended, from LINES before its end; sets `ended`.
log() {
    local lines=${1:-}
    while true; do
        # gcloud's own exit code doesn't tell a lost connection from a failed job; the worker is asked.
        worker 0 follow ${lines:+"$lines"} || true
        if [[ $dry_run ]]; then
            worker 0 status
            ended=0
        else
            ended=$(job_status)
        fi
        [[ $ended == running ]] || return 0
        lines=20
    done
}

# Only here and only from here: what is served there listens to that machine alone.
tunnel() {
    say "http://localhost:$port, until Ctrl-C"
    run gcloud compute tpus tpu-vm ssh "$name" --worker=0 --zone="$zone" --project="$project" -- \
        -N -o ExitOnForwardFailure=yes -L "$port:127.0.0.1:$port"
}

status() {
    say "$name is $(tpu_state)"
    if [[ $dry_run ]]; then worker 0 status; else say "its job: $(job_status)"; fi
}

fetch() {
    if [[ $workdir == gs://* ]]; then
        fetch_bucket "$workdir" "$results" "$checkpoints" "$project"
    else
        run mkdir -p "$results"
        worker 0 pack "$workdir" ${checkpoints:+"$checkpoints"}
        tpu scp "$name:starflow_results.tar.gz" "$results/" --worker=0 --quiet
        run tar --extract --gzip --file="$results/starflow_results.tar.gz" --directory="$results"
    fi
    say "results are in $results"
}

launch() {
    local code=0
    create || code=$?
    ((code != 75)) || die 'there is no capacity for it now; --queue waits for it' 1
    ((code == 0)) || exit "$code"
    if [[ ! $created && $(job_status) == running ]]; then
        worker 0 start "$workdir" "${job_flags[@]}" # says so, or fails where it is another job
    else
        install
        start
    fi
    trap 'say "the job goes on; the same command follows it again, the command stop ends it"; exit 130' INT
    see_it_through
    if [[ $ended != 0 && $ended != 130 ]]; then
        say "the job failed with exit code $ended; the last lines of each worker:"
        tpu ssh "$name" --worker=all --quiet --command='hostname; tail -n 20 starflow_job/log' || true
    fi
    fetch || say 'the results could not be fetched'
    if [[ $delete_at_end ]]; then delete; else say "$name is kept, and paid for: $(delete_command)"; fi
    exit "$ended"
}

delete_command() {
    command_line bash launch/tpu_vm.sh delete --name="$name" --zone="$zone" --project="$project"
}

# Follow the job to its own end, over preemptions and reboots; sets `ended` to its exit code.
see_it_through() {
    local restarts=0 lines='' now
    while true; do
        log "$lines"
        [[ $ended != 0 && $ended != 130 ]] || return 0
        sleep "$poll" # a preemption ends jobs and connections before it shows in the TPU's state
        now=$(tpu_state)
        lines=20
        case $now:$ended in
            UNKNOWN:* | READY:lost) continue ;;
            READY:gone | READY:none | READY:143) ;; # rebooted, or ended from outside
            READY:*) return 0 ;;
            ABSENT:*)
                # A preempted queued resource may have lost its TPU already; what is gone altogether, someone deleted.
                if [[ ! $queue || $(state queued state.state) == ABSENT ]]; then
                    say "$name has been deleted"
                    ended=1
                    return 0
                fi
                ;;
        esac
        if ((++restarts > max_restarts)); then
            say "interrupted $restarts times; that is more than --max-restarts"
            ended=1
            return 0
        fi
        say "interruption $restarts ($name is $now, its job $ended): resuming from the last checkpoint"
        if [[ $now == READY ]]; then
            worker all stop 30 # the other workers may wait for the lost one for ever
        elif create_again; then
            install
        else
            say "$name can't be created again"
            ended=1
            return 0
        fi
        start
        lines=''
    done
}

# As `create`, but waits for capacity.
create_again() {
    local code
    while true; do
        code=0
        create || code=$?
        ((code == 75)) || return "$code"
        say "no capacity; asking again in $poll s"
        sleep "$poll"
    done
}

command=${1:-}
case $command in
    launch | create | install | start | log | status | tunnel | stop | fetch | delete) shift ;;
    -h | --help)
        usage
        exit
        ;;
    '') die 'no command; see --help' ;;
    *) die "$command: no such command; see --help" ;;
esac
[[ " $* " != *' --help '* ]] || { usage; exit; }
parse "$@"
check
case $command in
    log)
        log
        [[ $ended =~ ^[0-9]+$ ]] || die "$name: the job can't be followed (it is $ended)" 1
        exit "$ended"
        ;;
    stop) worker all stop ;;
    *) "$command" ;;
esac
