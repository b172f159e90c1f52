#!/usr/bin/env bash
# Is the run healthy? ./training/health-check.sh
#
# Looks at a run in a container or on this machine: its state, what each endpoint answers, the
# GPU, and recent errors in its log. For a run that has ended, it reports how it ended and why.
# Every problem comes with a remedy.
#
# Usage: health-check.sh [--url URL] [--json] [--watch [SECONDS]]
#
#   --url URL          ask this server (default: the container's, then the one that a run on this
#                      machine has written to server.json, then http://127.0.0.1:8080)
#   --json             print one JSON object
#   --watch [SECONDS]  look again every 5 seconds; Ctrl-C ends it
#   --help             this text
#
# This script finds the container and passes on what Docker knows of it; `lora-trainer health`,
# which runs there or in training/.venv, does the rest.
#
# Variables: COMPOSE_PROJECT_NAME, HEALTH_PORT, LORA_OUTPUTS and LORA_VENV as for run.sh;
# HEALTH_TOKEN_FILE: a file with the token that the server asks for
# Exit codes: 0 healthy (a finished run is, too), 1 not, 69 nothing was installed yet, 78 wrong usage
set -Eeuo pipefail

TRAINING="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly TRAINING
# shellcheck source-path=SCRIPTDIR source=lib/stack.sh
source "$TRAINING/lib/stack.sh"
# shellcheck source-path=SCRIPTDIR source=lib/container.sh
source "$TRAINING/lib/container.sh"

readonly LOG_LINES=200
readonly FACTS='{"id": {{json .Id}}, "service": {{json (index .Config.Labels "com.docker.compose.service")}},
"state": {{json .State}}, "restarts": {{json .RestartCount}}}'

# docker_facts TRAINER: a line of JSON for each container, then the log of the one that says why
# the run ended
docker_facts() {
  local refused speaker="$1"
  docker inspect --format "${FACTS//$'\n'/ }" "$1"
  refused="$(container_of preflight)"
  if [[ -n "$refused" && "$(state_of "$1" Status)" == created ]]; then
    docker inspect --format "${FACTS//$'\n'/ }" "$refused"
    speaker="$refused"
  fi
  docker logs --tail "$LOG_LINES" "$speaker" 2>&1
}

# A host with Docker alone has no Python: one that runs looks at itself; for one that has ended, the
# environment here does, which knows whether a run on this machine is newer, or its image.
look_at_container() {
  case "$(state_of "$1" Status)" in
    exited | dead | created)
      if [[ -x "$PYTHON" ]]; then
        docker_facts "$1" | look_at_machine --docker "${@:2}"
      else
        docker_facts "$1" | docker run --rm --interactive --network none --read-only --cap-drop ALL \
          --security-opt no-new-privileges --env "LORA_OUTPUTS=$OUTPUTS" --env "LORA_MEMORY=$(setting LORA_MEMORY 16g)" \
          --entrypoint lora-trainer "$(docker inspect --format '{{.Image}}' "$1")" health --docker "${@:2}"
      fi
      ;;
    *) docker_facts "$1" | docker exec --interactive "$1" lora-trainer health --docker "${@:2}" ;;
  esac
}

look_at_machine() {
  [[ -x "$PYTHON" ]] || fail 69 "no run was found" "$TRAINING" \
    "there is no container of $COMPOSE_PROJECT_NAME, and no environment was installed here" "./training/run.sh starts a run"
  HEALTH_PORT="$(setting HEALTH_PORT 8080)" LORA_OUTPUTS="$OUTPUTS" LORA_MEMORY="$(setting LORA_MEMORY 16g)" \
    "$PYTHON" -m lora_trainer health "$@"
}

look() {
  local id=''
  [[ " $* " == *" --url"* ]] || ! has_engine || id="$(container_of trainer)"
  if [[ -n "$id" ]]; then look_at_container "$id" "$@"; else look_at_machine "$@"; fi
}

health_check_main() {
  local seconds=0 passed=()
  PYTHON="${LORA_VENV:-$TRAINING/.venv}/bin/python"
  [[ -x "$PYTHON" ]] || PYTHON="$TRAINING/.venv-cu121/bin/python"
  OUTPUTS="$(host_path LORA_OUTPUTS ../public/outputs)"
  while (($#)); do
    case "$1" in
      --watch)
        seconds=5
        [[ ! "${2:-}" =~ ^[1-9][0-9]*$ ]] || { seconds="$2" && shift; }
        ;;
      --help | -h) print_header "${BASH_SOURCE[0]}" && return ;;
      *) passed+=("$1") ;;
    esac
    shift
  done
  while ((seconds)); do
    say "$BOLD$(date +%H:%M:%S)$PLAIN  every $seconds s"
    look ${passed[@]+"${passed[@]}"} || true
    sleep "$seconds"
  done
  look ${passed[@]+"${passed[@]}"}
}

health_check_main "$@"
