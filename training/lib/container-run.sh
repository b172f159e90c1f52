#!/usr/bin/env bash
# A run in a container, for run.sh, which sources it after container.sh and sets COMMAND, CONFIG,
# PLACE, GPUS, PASSED, IS_BACKGROUND, IS_AIRGAPPED and STATE. It only defines functions.

# Prints the id of this project's trainer while it runs, or fails.
running_container() {
  local id
  has_engine || return 1
  id="$(container_of trainer)"
  [[ -n "$id" && "$(state_of "$id" Running)" == true ]] || return 1
  printf '%s\n' "$id"
}

# quoted TEXT...: JSON strings with commas between them
quoted() {
  local text separator=''
  for text; do
    text="${text//\\/\\\\}" text="${text//\"/\\\"}" text="${text//$'\n'/\\n}" text="${text//$'\t'/\\t}"
    # Compose replaces $NAME, unless the sign is doubled.
    printf '%s"%s"' "$separator" "${text//\$/\$\$}"
    separator=', '
  done
}

# renumbered LIST: as many numbers as the list has, from 0
renumbered() { awk -F, '{ for (i = 0; i < NF; i++) printf "%s%d", i ? "," : "", i }' <<<"$1"; }

# Writes what is this run's own, on top of the compose files: options, variables, certain GPUs.
write_override() {
  local service name lines=()
  OVERRIDE="$STATE/$COMPOSE_PROJECT_NAME.compose.yml"
  mkdir -p "$STATE"
  lines=("      - LORA_HOST_BY=run.sh") # the entrypoint's remedies are run.sh's then
  # The GPUs of a list are counted from 0 in the container.
  [[ ! "$GPUS" =~ ^[0-9] ]] || lines+=("      - CUDA_VISIBLE_DEVICES=$(renumbered "$GPUS")")
  # A name alone: Compose takes the value from here.
  while IFS='=' read -r name _; do
    [[ "$name" == LORA_TRAINER_CONFIG ]] || lines+=("      - $name")
  done < <(env | grep -E '^LORA_TRAINER_[A-Z0-9_]+=')
  {
    printf 'services:\n'
    for service in preflight trainer; do
      printf '  %s:\n    command: [%s]\n' "$service" \
        "$(quoted "$([[ "$service" == trainer ]] && echo train || echo preflight)" ${PASSED[@]+"${PASSED[@]}"})"
      printf '    environment:\n'
      printf '%s\n' "${lines[@]}"
      [[ "$service" == preflight || ! "$GPUS" =~ ^[0-9] ]] || printf '    deploy: {resources: {reservations: {devices: !override [%s]}}}\n' \
        "{driver: nvidia, device_ids: [\"${GPUS//,/\", \"}\"], capabilities: [gpu]}"
    done
  } >"$OVERRIDE"
}

# Makes the image if it is not there. It may be that no registry is in reach.
ensure_image() {
  local image
  image="$(setting LORA_IMAGE "lora-trainer:$STACK")"
  ! docker image inspect "$image" >/dev/null 2>&1 || return 0
  say "Building the image $image first (once; takes some minutes)"
  "$TRAINING/build.sh" --stack "$STACK" || {
    [[ "$PLACE" == any ]] || exit 69
    say "The image cannot be built here: training directly on this machine"
    return 1
  }
}

run_in_container() {
  local id
  require_docker
  [[ "$GPUS" != none ]] || export LORA_STACK=cpu
  STACK="$(container_stack)"
  export LORA_STACK="$STACK"
  ensure_image || {
    run_locally
    return
  }
  [[ "$STACK" == cpu ]] || require_gpu_runtime
  choose_user
  make_folders
  check_cpus
  secret_file HF_TOKEN
  secret_file WANDB_API_KEY
  LORA_CONFIG="$(cd "$(dirname "$CONFIG")" && pwd)/${CONFIG##*/}"
  export LORA_CONFIG
  write_override
  compose_command
  if [[ "$COMMAND" == check ]]; then
    "${COMPOSE[@]}" run --rm --no-deps --no-TTY trainer check ${PASSED[@]+"${PASSED[@]}"} || exit
    exit
  fi
  if id="$(running_container)"; then
    fail 75 "a run is already active in a container" "container ${id:0:12}" \
      "it would be stopped by another one of the same name" \
      "./training/run.sh logs | stop, or COMPOSE_PROJECT_NAME=another HEALTH_PORT=8081 ./training/run.sh"
  fi
  start_container
  say "Dashboard: $(dashboard)"
  if ((IS_BACKGROUND)); then
    say "The run continues in the container; ./training/run.sh logs | status | stop"
    [[ ! -d "$(secrets_folder)" ]] || watch_secrets
    return
  fi
  follow_container
  exit "$(state_of "$ID" ExitCode || echo 70)"
}

# Sets ID. Preflight's fault is shown, and its exit code is ours.
start_container() {
  local id code output
  if ! output="$("${COMPOSE[@]}" up --detach --no-build --force-recreate 2>&1)"; then
    id="$(container_of preflight)"
    code="$([[ -z "$id" ]] || state_of "$id" ExitCode)"
    if [[ -n "$code" && "$code" != 0 && "$(state_of "$id" Status)" == exited ]]; then
      docker logs "$id" >&2
      exit "$code"
    fi
    explain_start "$output"
  fi
  ID="$(container_of trainer)"
}

# Outlives this terminal, to remove the secrets' files when the run ends.
watch_secrets() {
  trap - EXIT
  (
    trap '' HUP INT
    while running_container >/dev/null || [[ "$(state_of "$ID" Status)" == restarting ]]; do
      docker wait "$ID" || true
      sleep 1
    done
    remove_secrets
  ) </dev/null >/dev/null 2>&1 &
}

explain_start() {
  local why
  why="$(tail -n 1 <<<"$1")"
  case "$1" in
    *"port is already allocated"* | *"address already in use"*)
      fail 69 "the port is taken" "HEALTH_PORT=$(setting HEALTH_PORT 8080)" "$why" \
        "HEALTH_PORT=8081 ./training/run.sh"
      ;;
    *"could not select device driver"* | *nvidia-container-cli* | *"unresolvable CDI"*)
      fail 69 "the engine cannot give the container a GPU" "docker-compose.training.yml" "$why" \
        "nvidia-smi on the host; set up the NVIDIA Container Toolkit; or ./training/run.sh --cpu"
      ;;
    *"bind source path does not exist"*)
      fail 78 "a folder or file to be mounted does not exist" "docker-compose.training.yml" "$why" \
        "make it, or name another one in .env.training"
      ;;
  esac
  say "$1"
  fail 70 "the container could not be started" "${COMPOSE[*]}" "$why" \
    "see above; or ./training/run.sh --local"
}

dashboard() {
  if ((IS_AIRGAPPED)); then
    printf 'not to be reached without a network; ./training/health-check.sh asks inside\n'
  else
    printf 'http://127.0.0.1:%s\n' "$(setting HEALTH_PORT 8080)"
  fi
}

# Shows the container's log until it has ended for good. A signal stops it, once.
follow_container() {
  local since='' log
  trap stop_container INT TERM HUP
  IS_STOPPING=0
  while :; do
    docker logs --follow ${since:+--since "$since"} "$ID" &
    log=$!
    # A trap ends `wait`, not the log: the container's last lines are still to come.
    while kill -0 "$log" 2>/dev/null; do wait "$log" || true; done
    since="$(date -u +%Y-%m-%dT%H:%M:%S.%NZ)"
    case "$(state_of "$ID" Status)" in
      running | restarting | created) sleep 0.2 ;;
      *) break ;;
    esac
  done
  trap - INT TERM HUP
}

stop_container() {
  ((IS_STOPPING == 0)) || return 0
  IS_STOPPING=1
  say "Stopping; saving a checkpoint ($(setting LORA_STOP_GRACE 120s) at most)"
  stop_for_good "$ID" >/dev/null 2>&1 &
}

# stop_for_good CONTAINER: without that, the Docker daemon starts it again when it starts itself
stop_for_good() {
  docker update --restart no "$1" >/dev/null || true
  docker stop "$1" >/dev/null
}
