#!/usr/bin/env bash
# Trains on a GKE cluster with TPU slices, by xpk (pip install xpk, in an environment of its own).
set -euo pipefail

usage() {
    cat <<'END'
bash launch/gke.sh COMMAND --cluster=CLUSTER [OPTIONS] [-- FLAGS]

FLAGS are those of python -m starflow_jax.main, without --workdir.

Commands
  cluster  create the cluster, with slices of --type and Cloud Storage FUSE, and attach the bucket to it
  launch   image, start and log; its exit code is 0 if and only if the job succeeded
  image    build launch/Dockerfile and push it to --image
  start    submit FLAGS as a workload; restarted after preemptions, it resumes from the last checkpoint
  log      follow the log of worker 0, wait for the workload's end
  status   the cluster's workloads
  stop     delete the workload; what it saved stays
  fetch    copy the results here
  delete   delete the cluster

Options
  --cluster=CLUSTER     of GKE
  --name=NAME           of the workload: small letters, digits, dashes
  --project=PROJECT     default: gcloud's
  --zone=ZONE           default: gcloud's compute/zone
  --type=TYPE           such as v5p-128 or v6e-256
  --slices=N            of that type; default 1
  --image=IMAGE         such as us-docker.pkg.dev/PROJECT/REPOSITORY/starflow_jax:1
  --workdir=gs://BUCKET/FOLDER   checkpoints and results
  --spot | --reservation=NAME    cluster: what its slices are; default: on demand
  --max-restarts=N      default 100
  --results=DIR         where fetch puts results; default: runs/NAME
  --checkpoints         fetch checkpoints too
  --dry-run             print what would be done, and do nothing
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

cluster='' name='' project='' zone='' type='' slices=1 image='' workdir='' capacity=--on-demand max_restarts=100
results='' checkpoints=''
job_flags=()

parse() {
    while (($#)); do
        case $1 in
            --cluster=?*) cluster=${1#*=} ;;
            --name=?*) name=${1#*=} ;;
            --project=?*) project=${1#*=} ;;
            --zone=?*) zone=${1#*=} ;;
            --type=?*) type=${1#*=} ;;
            --slices=?*) slices=${1#*=} ;;
            --image=?*) image=${1#*=} ;;
            --workdir=?*) workdir=${1#*=} ;;
            --spot | --reservation=?*)
                [[ $capacity == --on-demand ]] || die "$capacity and $1: only one of them"
                capacity=$1
                ;;
            --max-restarts=?*) max_restarts=${1#*=} ;;
            --results=?*) results=${1#*=} ;;
            --checkpoints) checkpoints=all ;;
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

# given OPTION...: each of these has a value.
given() {
    local option
    for option in "$@"; do
        [[ ${!option} ]] || die "--$option is missing; see --help"
    done
}

check() {
    need gcloud 'see https://cloud.google.com/sdk/docs/install'
    [[ $project ]] || project=$(setting project)
    [[ $zone ]] || zone=$(setting compute/zone)
    given project zone
    [[ $slices =~ ^[1-9][0-9]{0,5}$ ]] || die "--slices=$slices: must be a number, 1 or more"
    [[ $max_restarts =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--max-restarts=$max_restarts: must be a number"
    case $command in
        fetch) given name workdir ;;
        image) given image ;;
        cluster) given cluster type workdir ;;
        launch | start) given cluster name type image workdir ;;
        log | stop) given cluster name ;;
        *) given cluster ;;
    esac
    [[ ! $workdir ]] || is_bucket_folder "$workdir" || die "--workdir=$workdir: must be gs://BUCKET/FOLDER"
    [[ ! $name || $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name=$name: small letters, digits and dashes only"
    bucket=${workdir#gs://}
    bucket=${bucket%%/*}
    storage=${bucket//[._]/-}
    results=${results:-runs/$name}
    [[ $command == fetch || $command == image ]] || need xpk 'pip install xpk in an environment of its own'
    case $command in
        launch | image) need docker 'see https://docs.docker.com/engine/install' ;;
    esac
    case $command in
        launch | log) need kubectl 'gcloud components install kubectl' ;;
    esac
    case $command in
        launch | start)
            [[ " ${job_flags[*]-}" == *' --config='* ]] || die 'no training flags: end with -- --config=configs/t2v.py'
            [[ " ${job_flags[*]}" != *' --workdir'* ]] || die '--workdir belongs before the --'
            ;;
    esac
}

on_cluster() {
    run xpk "$@" --cluster="$cluster" --project="$project" --zone="$zone"
}

cluster() {
    on_cluster cluster create --tpu-type="$type" --num-slices="$slices" "$capacity" --enable-gcsfuse-csi-driver
    # Without caches: the workers have to see each other's files at once. The size is a form to be filled in: buckets
    # have none.
    on_cluster storage attach "$storage" --type=gcsfuse --bucket="$bucket" --mount-point="/buckets/$bucket" \
        --size=1 --readonly=false --auto-mount=false --mount-options=\
implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,file-system:rename-dir-limit:200000
}

image() {
    run docker build --file "$here/Dockerfile" --build-arg EXTRA=tpu --tag "$image" "${here%/*}"
    run docker push "$image"
}

start() {
    # xpk restarts on exit codes of 127 and more, a preemption's 143 among them; 1 is what the other workers end with
    # when one is lost. Bad flags (2) end the workload at once.
    on_cluster workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" --docker-image="$image" \
        --storage="$storage" --max-restarts="$max_restarts" --restart-on-exit-codes=1 \
        --termination-grace-period-seconds=300 --command="exec $(command_line bash launch/worker.sh run \
            "/buckets/$bucket/${workdir#"gs://$bucket/"}" "${job_flags[@]//"gs://$bucket/"/"/buckets/$bucket/"}")"
}

log() {
    local pod="xpk.google.com/workload=$name,batch.kubernetes.io/job-completion-index=0"
    run kubectl wait --for=condition=Ready pod --selector="$pod" --timeout=24h || say 'no pod is ready; waiting for its end'
    run kubectl logs --follow --selector="$pod" --container=jax-tpu --tail=-1 || say 'the log has ended'
    # Restarts give new pods, whose logs are not followed; this waits for the last of them.
    on_cluster workload list --wait-for-job-completion="$name"
}

launch() {
    image
    start
    log
}

status() {
    on_cluster workload list
}

stop() {
    on_cluster workload delete --workload="$name"
}

fetch() {
    fetch_bucket "$workdir" "$results" "$checkpoints" "$project"
}

delete() {
    on_cluster cluster delete
}

command=${1:-}
case $command in
    cluster | launch | image | start | log | status | stop | fetch | delete) shift ;;
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
"$command"
