#!/usr/bin/env bash
# How run.sh, build.sh and health-check.sh talk to a Docker engine. It is sourced after stack.sh
# and only defines functions. TRAINING is the folder of the compose files.

readonly COMPOSE_FILE_NAME=docker-compose.training.yml
readonly ENV_FILE="${LORA_ENV_FILE:-$TRAINING/.env.training}"
# shellcheck disable=SC2034 # LEAST_BUILDX is build.sh's
readonly LEAST_ENGINE=20.10 LEAST_COMPOSE=2.24 LEAST_BUILDX=0.8
export COMPOSE_PROJECT_NAME="${COMPOSE_PROJECT_NAME:-lora-trainer}"

# setting NAME DEFAULT: the variable, or what .env.training says, or the default
setting() {
  local line value=''
  if [[ -n "${!1:-}" ]]; then
    printf '%s\n' "${!1}"
    return
  fi
  if [[ -r "$ENV_FILE" ]]; then
    while IFS= read -r line || [[ -n "$line" ]]; do
      [[ "$line" != "$1="* ]] || value="${line#*=}"
    done <"$ENV_FILE"
  fi
  printf '%s\n' "${value:-$2}"
}

# is_older VERSION LEAST, e.g. 2.9.1 2.24
is_older() { [[ "$(printf '%s\n' "$2" "${1#v}" | sort -V | head -n 1)" != "$2" ]]; }

has_engine() { command -v docker >/dev/null && docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# require_docker: an engine, and a Compose that knows the files' syntax
require_docker() {
  local version why
  command -v docker >/dev/null || fail 69 "Docker is not installed" "PATH=$PATH" \
    "no command docker was found" "install Docker $LEAST_ENGINE or newer, or: ./training/run.sh --local"
  version="$(docker version --format '{{.Server.Version}}' 2>/dev/null)" || {
    why="$(docker version 2>&1 >/dev/null | tail -n 1 || true)"
    [[ "$why" != *"permission denied"* ]] || fail 77 "no permission to use the Docker engine" \
      "${DOCKER_HOST:-/var/run/docker.sock}" "$why" "sudo usermod -aG docker \$USER, then log in again"
    fail 69 "no Docker engine answers" "${DOCKER_HOST:-/var/run/docker.sock}" "${why:-it is not running}" \
      "sudo systemctl start docker, or: ./training/run.sh --local"
  }
  ! is_older "$version" "$LEAST_ENGINE" || fail 69 "the Docker engine is too old" "docker version" \
    "it is $version, needed is $LEAST_ENGINE" "update Docker, or: ./training/run.sh --local"
  version="$(docker compose version --short 2>/dev/null)" || fail 69 "Docker Compose v2 is missing" \
    "docker compose version" "the client does not know the command" \
    "install the package docker-compose-plugin (Debian 13: docker-compose)"
  ! is_older "$version" "$LEAST_COMPOSE" || fail 69 "Docker Compose is too old" "docker compose version" \
    "it is $version, needed is $LEAST_COMPOSE" "update the package docker-compose-plugin"
}

# Prints the stack for a container on this machine.
container_stack() {
  local stack
  stack="$(setting LORA_STACK '')"
  [[ -n "$stack" ]] || stack="$(driver_stack)" || stack=cpu
  known_stack "$stack"
  printf '%s\n' "$stack"
}

# require_gpu_runtime: without the toolkit the engine cannot give a container a GPU
require_gpu_runtime() {
  local found
  found="$(docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}{{range .CDISpecDirs}}cdi {{end}}' 2>/dev/null ||
    docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}' 2>/dev/null || true)"
  [[ " $found " != *" nvidia "* && " $found " != *" cdi "* ]] || return 0
  fail 69 "the engine cannot give a container the GPU" "docker info" \
    "the NVIDIA Container Toolkit is not set up" \
    "install nvidia-container-toolkit, sudo nvidia-ctk runtime configure --runtime=docker, sudo systemctl restart docker; or ./training/run.sh --cpu"
}

# shellcheck disable=SC2153 # STACK is the caller's
# Sets COMPOSE to the command with this run's files. STACK, IS_AIRGAPPED and OVERRIDE decide.
compose_command() {
  COMPOSE=(docker compose --project-directory "$TRAINING" -f "$TRAINING/$COMPOSE_FILE_NAME")
  [[ "$STACK" != cpu ]] || COMPOSE+=(-f "$TRAINING/docker-compose.cpu.yml")
  ((${IS_AIRGAPPED:-0} == 0)) || COMPOSE+=(-f "$TRAINING/docker-compose.airgapped.yml")
  [[ -z "${OVERRIDE:-}" ]] || COMPOSE+=(-f "$OVERRIDE")
  [[ ! -r "$ENV_FILE" ]] || COMPOSE+=(--env-file "$ENV_FILE")
}

# Prints the id of the newest container of a service, running or not.
container_of() {
  docker ps --all --quiet --no-trunc --latest \
    --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
    --filter "label=com.docker.compose.service=$1" 2>/dev/null || true
}

# state_of CONTAINER FIELD, e.g. Status, ExitCode, OOMKilled
state_of() { docker inspect --format "{{.State.$2}}" "$1" 2>/dev/null; }

# --- what a run needs on the host -----------------------------------------------------------

# Sets LORA_UID and LORA_GID, whose the results will be: the caller's. Root's runs belong to who
# called sudo, or to user 1000: nothing trains as root.
choose_user() {
  local user group
  user="$(id -u)" group="$(id -g)"
  if ((user == 0)); then
    user="${SUDO_UID:-1000}" group="${SUDO_GID:-1000}"
    ((user != 0)) || user=1000 group=1000
  fi
  LORA_UID="$(setting LORA_UID "$user")" LORA_GID="$(setting LORA_GID "$group")"
  export LORA_UID LORA_GID
}

# host_path NAME DEFAULT: a folder or file, from the compose file's folder if it is relative
host_path() {
  local path
  path="$(setting "$1" "$2")"
  [[ "$path" == /* ]] || path="$TRAINING/$path"
  printf '%s\n' "$path"
}

# own_folder FOLDER: makes it the run's user's; Docker would make it root's
own_folder() {
  local why
  why="$(export LC_ALL=C && mkdir -p -- "$1" 2>&1)" || fail 77 "a folder cannot be created" "$1" \
    "${why##*: }" "make it, or name another one in .env.training"
  # Root may have made it, or a checkout by root: what is in it stays as it is.
  if ((EUID == 0)) && [[ "$(stat -c %u "$1")" == 0 ]]; then
    chown "$LORA_UID:$LORA_GID" -- "$1"
  fi
}

make_folders() {
  LORA_OUTPUTS="$(host_path LORA_OUTPUTS ../public/outputs)"
  LORA_MODELS="$(host_path LORA_MODELS models)"
  LORA_LOGS="$(host_path LORA_LOGS logs)"
  LORA_DATASETS="$(host_path LORA_DATASETS ../public/datasets)"
  export LORA_OUTPUTS LORA_MODELS LORA_LOGS LORA_DATASETS
  own_folder "$LORA_OUTPUTS"
  own_folder "$LORA_MODELS"
  own_folder "$LORA_LOGS"
  [[ -d "$LORA_DATASETS" ]] || fail 65 "the dataset folder does not exist" "LORA_DATASETS=$LORA_DATASETS" \
    "there is no such folder" "mkdir -p $LORA_DATASETS, or set LORA_DATASETS"
}

# check_cpus: Compose takes a whole number of CPUs
check_cpus() {
  local cpus
  cpus="$(setting LORA_CPUS 4)"
  [[ "$cpus" =~ ^[1-9][0-9]*$ ]] || fail 78 "invalid LORA_CPUS" "LORA_CPUS=$cpus" \
    "it must be a whole number of CPUs" "LORA_CPUS=4 ./training/run.sh"
}

# secret_file VARIABLE: moves a secret of the environment to a file that the run's user alone may
# read, so that `docker inspect` does not show it, and sets VARIABLE_FILE. The file is this run's:
# it goes when the run ends.
secret_file() {
  local value file_variable="$1_FILE" folder
  folder="$(secrets_folder)"
  value="$(setting "$1" '')"
  [[ -n "$value" && -z "$(setting "$file_variable" '')" ]] || return 0
  trap remove_secrets EXIT
  (umask 077 && mkdir -p "$folder" && printf '%s\n' "$value" >"$folder/$1")
  ((EUID != 0)) || chown "$LORA_UID:$LORA_GID" "$folder" "$folder/$1"
  export "$file_variable=$folder/$1" "$1="
}

secrets_folder() { printf '%s\n' "$STATE/secrets/$COMPOSE_PROJECT_NAME"; }

# Leaves them to a container that goes on, or may: Docker mounts them again when it restarts it.
remove_secrets() {
  local id
  id="$(container_of trainer)"
  case "$([[ -z "$id" ]] || state_of "$id" Status)" in
    running | restarting | paused) ;;
    *) ! has_engine || rm -rf -- "$(secrets_folder)" ;;
  esac
}
