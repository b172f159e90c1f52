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
#   LORA_REQUIRE_GPU      1: exit 69 where no GPU is visible, instead of training on the CPU
#   LORA_GPU_RESERVED     1: preflight checks that this host can give the trainer a GPU
#   LORA_HOST_<MOUNT>, LORA_HOST_CONFIG, LORA_HOST_PORT   what the mounts (OUTPUTS, DATASETS, MODELS,
#                         LOGS), the config file and the port are called on the host
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
readonly NVIDIA_VERSION="${LORA_NVIDIA_VERSION:-/proc/driver/nvidia/version}"

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

# on_host PATH: prints what it is called on the host, where Compose says so
on_host() {
  local name variable path
  for name in OUTPUTS DATASETS MODELS LOGS CONFIG; do
    variable="LORA_HOST_$name" path="$WORKSPACE/${name,,}"
    [[ "$name" != CONFIG ]] || path="$WORKSPACE/config.json"
    if [[ -n "${!variable:-}" && ("$1" == "$path" || "$1" == "$path"/*) ]]; then
      printf '%s%s\n' "${!variable}" "${1#"$path"}"
      return
    fi
  done
  printf '%s\n' "$1"
}

# Prints the command that starts these containers, after what may stand before it.
compose_up() {
  printf 'docker compose -f docker-compose.training.yml%s up\n' \
    "$([[ "${1:-${LORA_STACK:-}}" != cpu ]] || printf ' -f docker-compose.cpu.yml')"
}

# --- mounts ---------------------------------------------------------------------------------

# why_not_writable FOLDER: prints why no file can be created there, nothing if one can
why_not_writable() {
  local probe="$1/.writable-$$"
  (export LC_ALL=C && { mkdir -p "$1" && : >"$probe" && rm -f -- "$probe"; } 2>&1) || true
}

check_mounts() {
  local folder why refused=() datasets="$WORKSPACE/datasets"
  for folder in "$WORKSPACE/outputs" "$WORKSPACE/models" "$WORKSPACE/logs"; do
    why="$(why_not_writable "$folder")"
    case "$why" in
      '') ;;
      *"Read-only file system"*)
        fail 77 "no permission" "$(on_host "$folder") cannot be written" "$(on_host "$folder")" \
          "it is mounted read-only at $folder" "mount it without :ro"
        ;;
      *"No space left"*)
        fail 74 "disk full or I/O" "$(on_host "$folder") cannot be written" "$(on_host "$folder")" \
          "the disk is full" "free some room on the host: df -h"
        ;;
      *) refused+=("$folder") ;;
    esac
  done
  ((${#refused[@]} == 0)) || refuse_owner "${refused[@]}"
  if [[ ! -r "$datasets" || ! -x "$datasets" ]]; then
    fail 77 "no permission" "the datasets cannot be read" "$(on_host "$datasets")" \
      "it belongs to $(stat -c '%u:%g, mode %a' "$datasets" 2>/dev/null || echo nobody), the container runs as $(id -u):$(id -g)" \
      "on the host: chmod -R a+rX $(on_host "$datasets")"
  fi
}

# refuse_owner FOLDER...: they belong to another user. That user is taken where it is one and not
# root; else the folders are handed over. All of them at once.
refuse_owner() {
  local folder owner names=() owners remedy
  for folder; do names+=("$(on_host "$folder")"); done
  owners="$(stat -c '%u:%g' "$@" 2>/dev/null | sort -u)"
  owner="${owners%%$'\n'*}"
  remedy="on the host: sudo chown -R $(id -u):$(id -g) ${names[*]}"
  if [[ "$owners" == "$owner" && "$owner" != 0:* && "${LORA_HOST_BY:-}" != run.sh ]]; then
    if [[ -n "${LORA_HOST_OUTPUTS:-}" ]]; then
      remedy="train as their owner: LORA_UID=${owner%:*} LORA_GID=${owner#*:} $(compose_up), or ./run.sh"
    else
      remedy="train as their owner: docker run --user $owner"
    fi
  fi
  fail 77 "no permission" "${names[0]} cannot be written" "${names[*]}" \
    "$([[ $# == 1 ]] && echo it belongs || echo they belong) to $(printf '%s' "$owners" | tr '\n' ' '), the container runs as $(id -u):$(id -g)" "$remedy"
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
    fail 78 "configuration" "the config file is a folder" "$(on_host "$CONFIG")" \
      "Docker creates a folder where the file to be mounted does not exist on the host" \
      "on the host: rmdir $(on_host "$CONFIG"), put a config file there, start again"
  fi
  if [[ -e "$CONFIG" && ! -r "$CONFIG" ]]; then
    fail 77 "no permission" "the config file cannot be read" "$(on_host "$CONFIG")" \
      "its mode is $(stat -c '%a, owner %u' "$CONFIG"), the container runs as $(id -u):$(id -g)" \
      "on the host: chmod a+r $(on_host "$CONFIG")"
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

refuse_gpu() { fail 69 "model, hub or device unavailable" "$@"; }

no_gpu() {
  [[ "${LORA_REQUIRE_GPU:-0}" != 1 ]] || refuse_gpu "$1" "the stack $LORA_STACK" "$2" "$3"
  warn "$1: $2. Training runs on the CPU. Remedy: $3"
}

# check_driver VERSION LEAST
check_driver() {
  ((${1%%.*} < $2)) || return 0
  refuse_gpu "the driver is too old for the stack $LORA_STACK" "nvidia-smi" "it is $1, needed is $2" \
    "update the driver$([[ "$LORA_STACK" == current ]] && echo ', or ./build.sh --stack cu121'), or leave the GPU alone: ./run.sh --cpu"
}

# Preflight itself gets no GPU: Docker would not start it where there is none to give. The driver
# of the host's kernel is seen all the same, but for Windows' Linux, which has it elsewhere.
check_host_gpu() {
  local text=''
  if [[ -r "$NVIDIA_VERSION" ]]; then
    text="$(<"$NVIDIA_VERSION")"
    [[ ! "$text" =~ [^0-9]([0-9]{3,}\.[0-9.]+) ]] || check_driver "${BASH_REMATCH[1]}" "$1"
    say "GPU: the driver ${BASH_REMATCH[1]:-} is loaded. If Docker cannot select the device driver \"nvidia\", it lacks the" \
      "toolkit: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
  elif [[ "$(uname -r)" != *icrosoft* ]]; then
    refuse_gpu "this host has no NVIDIA GPU, or no driver for it" "the stack $LORA_STACK" \
      "$NVIDIA_VERSION does not exist, so Docker has no GPU to give to the trainer" \
      "without a GPU: $(compose_up cpu), or ./run.sh, which chooses by itself; with one: install its driver and the NVIDIA Container Toolkit"
  fi
}

check_gpu() {
  local driver capability least_driver least most gpus
  case "${LORA_STACK:-cpu}" in
    cu121) least_driver=525 least=70 most=90 ;;
    current) least_driver=580 least=75 most=999 ;;
    *) least_driver=0 least=0 ;;
  esac
  if [[ "$1" == preflight && "${LORA_GPU_RESERVED:-0}" == 1 ]] && ! command -v nvidia-smi >/dev/null; then
    check_host_gpu "$least_driver"
    return
  fi
  ((least > 0)) || return 0
  # Hidden on purpose.
  [[ "${CUDA_VISIBLE_DEVICES-all}" != '' && "${CUDA_VISIBLE_DEVICES-all}" != -1 ]] || return 0
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
    check_driver "$driver" "$least_driver"
    ((${capability/./} < least || ${capability/./} > most)) || continue
    refuse_gpu "the stack $LORA_STACK does not serve this GPU" "nvidia-smi" \
      "its compute capability is $capability, served are ${least:0:1}.${least:1} to ${most:0:-1}.${most: -1}" \
      "./build.sh --stack $([[ "$LORA_STACK" == cu121 ]] && echo current || echo cu121); another GPU: NVIDIA_VISIBLE_DEVICES=1; or ./run.sh --cpu"
  done <<<"$gpus"
}

# --------------------------------------------------------------------------------------------

# check_container COMMAND
check_container() {
  check_mounts
  find_config
  check_shm
  check_gpu "$1"
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
      check_container train
      exec lora-trainer train --config "$CONFIG" "${@:2}"
      ;;
    preflight)
      check_container preflight
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
