#!/usr/bin/env bash
# Fine-tune a model: ./training/run.sh
#
# Trains in a container if a Docker engine answers, otherwise directly on this machine. The first
# start builds the image (build.sh) or the environment (training/.venv); later starts install
# nothing and need no network. A run that was stopped resumes where it left off.
#
# Usage: run.sh [--config FILE] [--check] [--resume [never]] [--cpu | --gpus LIST] [--background]
#               [--docker | --local] [--airgapped] [--KEY VALUE ...]
#        run.sh stop | logs | status
#
#   --config FILE   the config file (default: training/config.json)
#   --check         check config, data, model, disk and permissions; train nothing
#   --resume        resume from the newest valid checkpoint (default); never: start over
#   --cpu           do not use the GPUs
#   --gpus LIST     all (default), none, or numbers as nvidia-smi shows them: 0 or 0,1; one process
#                   per GPU, and all share every step
#   --background    return once the run has started; it keeps running after the terminal closes
#   --docker        train in a container, or fail
#   --local         train directly on this machine
#   --airgapped     train in a container without a network
#   --help          this text
#   --KEY VALUE     any key of the config, e.g. --learning_rate 1e-4, and any flag of the trainer
#   --              pass everything after it to the trainer
#   stop            save a checkpoint, stop the run, and wait for it to end
#   logs            show and follow what the run prints
#   status          the same as health-check.sh
#
# Dataset names are also looked up in public/datasets. A container sees only that folder
# (LORA_DATASETS), and writes results to LORA_OUTPUTS (public/outputs) as the calling user.
#
# Variables:
#   LORA_TRAINER_CONFIG   the config file if --config is not given
#   LORA_TRAINER_<KEY>    a key of the config, e.g. LORA_TRAINER_LEARNING_RATE
#   LORA_STACK            the packages: cpu, current (GPU, driver 580+) or cu121 (GPU, driver 525+);
#                         default: what the GPU and its driver support, else cpu
#   LORA_PYTHON           the Python to create the environment with (default: the first of 3.11+, then
#                         3.10; for the stack cu121 the first 3.10, then 3.11)
#   LORA_VENV             folder of the environment (default: training/.venv; training/.venv-cu121);
#                         it belongs to the checkout that made it, others only use its packages
#   COMPOSE_PROJECT_NAME  distinguishes container runs (default: lora-trainer)
#   those of .env.training: image, folders, limits, port
#   HF_TOKEN, HF_TOKEN_FILE, HF_HOME, NO_COLOR, CUDA_VISIBLE_DEVICES: as usual; pip's own settings
#   (PIP_*, pip.conf) decide where packages come from
#
# Exit codes: 0 finished, 65 data, 69 unavailable (Docker, Python, packages, model, device), 70
# internal fault, 74 disk, 75 another run is under way, 77 no permission, 78 config, 137 memory,
# 143 stopped by a signal, 130 Ctrl-C before the run began
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
# shellcheck source-path=SCRIPTDIR source=lib/container.sh
source "$TRAINING/lib/container.sh"
# shellcheck source-path=SCRIPTDIR source=lib/container-run.sh
source "$TRAINING/lib/container-run.sh"

readonly STATE="$TRAINING/.cache"
readonly LOCAL_PID="$STATE/local.pid" LOCAL_LOG="$STATE/local.log"

read_arguments() {
  COMMAND=train PLACE=any GPUS=all IS_BACKGROUND=0 IS_AIRGAPPED=0 PASSED=()
  CONFIG="${LORA_TRAINER_CONFIG:-$TRAINING/config.json}"
  case "${1:-}" in
    stop | logs | status)
      (($# == 1)) || fail 78 "$1 takes no argument" "command line: ${*:2}" "it takes no options" "run.sh $1"
      COMMAND="$1"
      return
      ;;
  esac
  while (($#)); do
    [[ "$1" != --config=* && "$1" != --gpus=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case "$1" in
      --config) need_value "$@" && CONFIG="$2" && shift ;;
      --gpus) need_value "$@" && select_gpus "$2" && shift ;;
      --cpu) select_gpus none ;;
      --check) COMMAND=check ;;
      --background) IS_BACKGROUND=1 ;;
      --local) PLACE=local ;;
      --docker) PLACE=docker ;;
      --airgapped) PLACE=docker IS_AIRGAPPED=1 ;;
      --help | -h) print_header "${BASH_SOURCE[0]}" && exit ;;
      --) PASSED+=("${@:2}") && return ;;
      *) PASSED+=("$1") ;;
    esac
    shift
  done
}

select_gpus() {
  [[ "$1" =~ ^(all|none|[0-9]+(,[0-9]+)*)$ ]] || fail 78 "--gpus is not understood" "--gpus $1" \
    "it takes all, none, or numbers with commas between them" "run.sh --gpus 0,1"
  GPUS="$1"
}

# --- directly on this machine ---------------------------------------------------------------

run_locally() {
  case "$GPUS" in
    all) ;;
    none)
      export CUDA_VISIBLE_DEVICES=""
      export LORA_STACK="${LORA_STACK:-cpu}"
      ;;
    *) export CUDA_VISIBLE_DEVICES="$GPUS" ;;
  esac
  prepare_environment "$TRAINING/run.sh" --local ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  set -- "$VENV/bin/python" -m lora_trainer "$COMMAND" --config "$CONFIG" \
    ${PASSED[@]+"${PASSED[@]}"}
  ((IS_BACKGROUND)) || exec "$@"
  start_in_background "$@"
}

start_in_background() {
  local pid
  if pid="$(local_pid)"; then
    fail 75 "a run is already active in the background" "process $pid" "run.sh manages one background run at a time" \
      "./training/run.sh stop, or run it in the foreground with another --run_name"
  fi
  mkdir -p "$STATE"
  # A session of its own: it outlives the terminal, and Ctrl-C there is not meant for it.
  setsid "$@" >"$LOCAL_LOG" 2>&1 </dev/null &
  pid=$!
  printf '%s\n' "$pid" >"$LOCAL_PID"
  sleep 2
  if ! kill -0 "$pid" 2>/dev/null; then
    cat "$LOCAL_LOG" >&2
    rm -f -- "$LOCAL_PID"
    wait "$pid"
    exit
  fi
  say "The run continues as process $pid: $(grep -m 1 -o 'http://[^ ]*' "$LOCAL_LOG" || echo "$LOCAL_LOG")"
  say "  ./training/run.sh logs | status | stop"
}

# Prints the process id of the run that --background started here, if it is still there.
local_pid() {
  local pid=''
  [[ -r "$LOCAL_PID" ]] && read -r pid <"$LOCAL_PID" || return 1
  # Its number may be another process's by now.
  [[ "$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null || ps -p "$pid" -o command=)" == *lora_trainer* ]] || return 1
  printf '%s\n' "$pid"
}

# --- subcommands ----------------------------------------------------------------------------

stop_run() {
  local pid id
  if pid="$(local_pid)"; then
    say "Stopping process $pid; saving a checkpoint"
    kill -TERM "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    rm -f -- "$LOCAL_PID"
  elif id="$(running_container)"; then
    say "Stopping the container; saving a checkpoint"
    stop_for_good "$id"
    remove_secrets
    say "stopped with exit code $(state_of "$id" ExitCode)"
  else
    say "No run was started by run.sh in the background; stop one in the foreground with Ctrl-C"
  fi
}

show_logs() {
  local id
  if local_pid >/dev/null; then
    exec tail -n +1 -F "$LOCAL_LOG"
  fi
  id="$(has_engine && container_of trainer)" || id=''
  [[ -z "$id" ]] || exec docker logs --follow "$id"
  [[ ! -r "$LOCAL_LOG" ]] || exec cat "$LOCAL_LOG"
  fail 69 "there is no log" "./training/run.sh logs" "no run has been started" "./training/run.sh"
}

# --------------------------------------------------------------------------------------------

run_main() {
  ARGUMENTS=("$@")
  read_arguments "$@"
  case "$COMMAND" in
    stop) stop_run && return ;;
    logs) show_logs ;;
    status) exec "$TRAINING/health-check.sh" ;;
  esac
  [[ -r "$CONFIG" && ! -d "$CONFIG" ]] || fail 78 "the config file is not readable" "$CONFIG" \
    "$([[ -e "$CONFIG" ]] && echo "it is a folder or not readable" || echo "there is no such file")" \
    "run.sh --config FILE"
  if [[ "$PLACE" == any ]] && { ! has_engine || ! docker compose version >/dev/null 2>&1; }; then
    PLACE=local
  elif [[ "$PLACE" == any ]]; then
    say "A Docker engine answers: training in a container (--local trains directly on this machine)"
  fi
  if [[ "$PLACE" == local ]]; then run_locally; else run_in_container; fi
}

run_main "$@"
