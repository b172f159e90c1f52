#!/usr/bin/env bash
# What the container starts: checks what Docker gave it, then becomes the trainer's supervisor.
#
# Usage: docker-entrypoint.sh [train | preflight | healthcheck | --KEY VALUE ... | COMMAND ...]
#
#   train         (default) check, then train with /workspace/config.json; options follow it
#   preflight     check mounts, config, data, model and disk; train nothing
#   healthcheck   ask /health; exit 0 if the run is well (what HEALTHCHECK calls)
#   --KEY VALUE   options alone are train's
#   check, schema, keys, ...   any other command of lora-trainer
#   COMMAND       anything else is executed as it stands, e.g. bash or python3
#
# Variables:
#   LORA_TRAINER_CONFIG   the config file (default: /workspace/config.json)
#   LORA_REQUIRE_GPU      1: exit 69 where no GPU can be used, instead of training on the CPU
#   HF_TOKEN_FILE, WANDB_API_KEY_FILE, LORA_TRAINER_HEALTH_TOKEN_FILE: files with secrets; one
#   that is empty counts as not given
#   LORA_TRAINER_<KEY>    a key of the config
#
# Exit codes: the trainer's; from here 69 no usable GPU, 74 a full disk, 77 a mount that may not be
# written, 78 config
set -Eeuo pipefail

readonly WORKSPACE="${LORA_WORKSPACE:-/workspace}"
readonly DEFAULT_CONFIG="${LORA_DEFAULT_CONFIG:-/opt/trainer/config.json}"
readonly LEAST_SHM_MB=1024

if [[ -t 2 && -z "${NO_COLOR:-}" && "${TERM:-dumb}" != dumb ]]; then
  readonly BOLD=$'\e[1m' RED=$'\e[31m' YELLOW=$'\e[33m' PLAIN=$'\e[0m'
else
  readonly BOLD='' RED='' YELLOW='' PLAIN=''
fi

say() { printf '%s\n' "$*" >&2; }

warn() { say "${YELLOW}warning$PLAIN  $*"; }

# fail CODE MEANING WHAT WHERE WHY REMEDY: the block that every fault of the trainer ends with
fail() {
  say ""
  say "$RED$BOLD$3$PLAIN"
  say "  where:  $4"
  say "  why:    $5"
  say "  remedy: $6"
  say "exit code $1 ($2)"
  exit "$1"
}

# --- mounts ---------------------------------------------------------------------------------

# require_writable FOLDER MOUNT HOST_VARIABLE: a folder in which a file can really be made
require_writable() {
  local folder="$1" owner probe="$1/.writable-$$" why
  if why="$(export LC_ALL=C && { mkdir -p "$folder" && : >"$probe" && rm -f -- "$probe"; } 2>&1)"; then
    return
  fi
  owner="$(stat -c '%u:%g' "$folder" 2>/dev/null || echo unknown)"
  case "$why" in
    *"Read-only file system"*)
      fail 77 "no permission" "$folder cannot be written" "$folder" "it is mounted read-only" \
        "mount it without :ro; the host folder is \$$2"
      ;;
    *"No space left"*)
      fail 74 "disk full or I/O" "$folder cannot be written" "$folder" "the disk is full" \
        "free some room on the host: df -h"
      ;;
    *)
      fail 77 "no permission" "$folder cannot be written" "$folder" \
        "it belongs to $owner, the container runs as $(id -u):$(id -g)" \
        "on the host: sudo chown -R $(id -u):$(id -g) THE_FOLDER_MOUNTED_AT_$folder (default: $3)"
      ;;
  esac
}

check_mounts() {
  local datasets="$WORKSPACE/datasets"
  require_writable "$WORKSPACE/outputs" LORA_OUTPUTS public/outputs
  require_writable "$WORKSPACE/models" LORA_MODELS training/models
  require_writable "$WORKSPACE/logs" LORA_LOGS training/logs
  if [[ ! -r "$datasets" || ! -x "$datasets" ]]; then
    fail 77 "no permission" "the datasets cannot be read" "$datasets" \
      "it belongs to $(stat -c '%u:%g, mode %a' "$datasets" 2>/dev/null || echo nobody), the container runs as $(id -u):$(id -g)" \
      "on the host: chmod -R a+rX THE_FOLDER_MOUNTED_AT_$datasets (default: public/datasets)"
  fi
}

check_shm() {
  local megabytes
  megabytes="$(df -Pm /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }')"
  if [[ "$megabytes" =~ ^[0-9]+$ ]] && ((megabytes < LEAST_SHM_MB)); then
    warn "/dev/shm has $megabytes MB; several processes exchange data there: docker run --shm-size 8g"
  fi
}

# --- configuration --------------------------------------------------------------------------

# Sets CONFIG to the file to train with; makes the default where none is mounted.
find_config() {
  CONFIG="${LORA_TRAINER_CONFIG:-$WORKSPACE/config.json}"
  if [[ -d "$CONFIG" ]]; then
    fail 78 "configuration" "the config file is a folder" "$CONFIG" \
      "Docker makes a folder where the file to be mounted does not exist on the host" \
      "on the host: rmdir the folder, put the file there (cp training/config.json ...), start again"
  fi
  if [[ -e "$CONFIG" && ! -r "$CONFIG" ]]; then
    fail 77 "no permission" "the config file cannot be read" "$CONFIG" \
      "its mode is $(stat -c '%a, owner %u' "$CONFIG"), the container runs as $(id -u):$(id -g)" \
      "on the host: chmod a+r THE_FILE"
  fi
  [[ ! -e "$CONFIG" ]] || return 0
  if [[ -n "${LORA_TRAINER_CONFIG:-}" ]]; then
    fail 78 "configuration" "the config file does not exist" "LORA_TRAINER_CONFIG=$CONFIG" \
      "nothing is mounted there" "mount it: -v \$PWD/config.json:$CONFIG:ro"
  fi
  if ! cp -- "$DEFAULT_CONFIG" "$CONFIG" 2>/dev/null; then
    CONFIG="${TMPDIR:-/tmp}/config.json" # the root is read-only
    cp -- "$DEFAULT_CONFIG" "$CONFIG"
  fi
  say "No config file is mounted at $WORKSPACE/config.json: the default job is trained, its config is $CONFIG"
}

# Secrets that Compose mounts from nowhere are empty files.
drop_empty_secrets() {
  local name
  for name in HF_TOKEN_FILE WANDB_API_KEY_FILE LORA_TRAINER_HEALTH_TOKEN_FILE; do
    [[ -n "${!name:-}" && -e "${!name}" && ! -s "${!name}" ]] && unset "$name"
  done
  for name in HF_TOKEN WANDB_API_KEY; do
    [[ -n "${!name:-}" ]] || unset "$name"
  done
  # wandb itself knows no file.
  if [[ -z "${WANDB_API_KEY:-}" && -n "${WANDB_API_KEY_FILE:-}" ]]; then
    WANDB_API_KEY="$(<"$WANDB_API_KEY_FILE")"
    export WANDB_API_KEY
  fi
}

# --- GPU ------------------------------------------------------------------------------------

# Prints "DRIVER CAPABILITY" of each GPU, e.g. "535.104.05 8.6".
list_gpus() {
  nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null |
    tr -d ',' | grep -E '^[0-9.]+ [0-9]+\.[0-9]+$'
}

no_gpu() {
  [[ "${LORA_REQUIRE_GPU:-0}" != 1 ]] ||
    fail 69 "model, hub or device unavailable" "$1" "the stack $LORA_STACK" "$2" "$3"
  warn "$1: $2. Training runs on the CPU. Remedy: $3"
}

# A GPU that is there and cannot be used: the run is not moved to the CPU behind the user's back.
unserved_gpu() {
  fail 69 "model, hub or device unavailable" "$1" "the stack $LORA_STACK" "$2" \
    "$3; or on the host ./training/run.sh --cpu"
}

check_gpu() {
  local driver capability least_driver least most gpus
  # Hidden on purpose.
  [[ "${CUDA_VISIBLE_DEVICES-all}" != '' && "${CUDA_VISIBLE_DEVICES-all}" != -1 ]] || return 0
  case "${LORA_STACK:-cpu}" in
    cu121) least_driver=525 least=70 most=90 ;;
    current) least_driver=580 least=75 most=999 ;;
    *) return 0 ;;
  esac
  if ! command -v nvidia-smi >/dev/null; then
    no_gpu "no GPU is visible" "the NVIDIA Container Toolkit put no driver into this container" \
      "docker run --gpus all; install the toolkit if that fails: nvidia-ctk runtime configure --runtime=docker"
    return
  fi
  gpus="$(list_gpus || true)"
  if [[ -z "$gpus" ]]; then
    no_gpu "no GPU answers" "nvidia-smi lists none" "nvidia-smi on the host; then docker run --gpus all"
    return
  fi
  while read -r driver capability; do
    if ((${driver%%.*} < least_driver)); then
      unserved_gpu "the driver is too old for the stack $LORA_STACK" \
        "it is $driver, needed is $least_driver" \
        "update the driver$([[ "$LORA_STACK" == current ]] && echo ', or ./build.sh --stack cu121')"
    elif ((${capability/./} < least || ${capability/./} > most)); then
      unserved_gpu "the stack $LORA_STACK does not serve this GPU" \
        "its compute capability is $capability, served are ${least:0:1}.${least:1} to ${most:0:-1}.${most: -1}" \
        "./build.sh --stack $([[ "$LORA_STACK" == cu121 ]] && echo current || echo cu121)"
    fi
  done <<<"$gpus"
}

# --------------------------------------------------------------------------------------------

check_container() {
  check_mounts
  find_config
  check_shm
  check_gpu
}

healthcheck() {
  exec python3 -I -S -c 'import http.client, os, sys
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("HEALTH_PORT") or 8080), timeout=3)
try:
    connection.request("GET", "/health")
    answer = connection.getresponse()
    print(answer.read(2000).decode("utf-8", "replace"))
except OSError as error:
    sys.exit(f"no answer on port {connection.port}: {error}")
sys.exit(answer.status != 200)'
}

entrypoint_main() {
  [[ "${1:-}" != -* ]] || set -- train "$@"
  drop_empty_secrets
  case "${1:-train}" in
    train)
      check_container
      exec lora-trainer train --config "$CONFIG" "${@:2}"
      ;;
    preflight)
      check_container
      exec lora-trainer check --quick --config "$CONFIG" "${@:2}"
      ;;
    healthcheck) healthcheck ;;
    check)
      find_config
      exec lora-trainer check --config "$CONFIG" "${@:2}"
      ;;
    chat | evaluate | merge | export | dashboard | schema | keys) exec lora-trainer "$@" ;;
    *) exec "$@" ;;
  esac
}

entrypoint_main "$@"
