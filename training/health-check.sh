#!/usr/bin/env bash
# Is the run well? ./training/health-check.sh
#
# Looks at a run in a container or on the machine itself: its state, what each endpoint answers,
# the GPU, recent errors of its log. A run that has ended is looked at too: how it ended, and why.
# Every problem comes with a remedy.
#
# Usage: health-check.sh [--url URL] [--json] [--watch [SECONDS]]
#
#   --url URL          ask this server (default: the container's, then the one that a run on this
#                      machine has written to server.json, then http://127.0.0.1:8080)
#   --json             one JSON object
#   --watch [SECONDS]  again and again, every 5 seconds; Ctrl-C ends it
#   --help             this text
#
# Variables: COMPOSE_PROJECT_NAME, HEALTH_PORT and LORA_OUTPUTS as for run.sh; HEALTH_TOKEN_FILE: a
# file with the token where one is needed
# Exit codes: 0 healthy (a finished run is, too), 1 not, 78 wrong usage
set -Eeuo pipefail

TRAINING="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly TRAINING
# shellcheck source-path=SCRIPTDIR source=stack.sh
source "$TRAINING/stack.sh"
# shellcheck source-path=SCRIPTDIR source=container.sh
source "$TRAINING/container.sh"

readonly ANSWER_SECONDS=4 LOG_LINES=200
readonly ENDPOINTS=(/health /metrics /status /history)

read_arguments() {
  URL='' IS_JSON=0 WATCH_SECONDS=0
  while (($#)); do
    case "$1" in
      --url)
        (($# > 1)) || fail 78 "--url lacks its value" "command line" "nothing follows it" "health-check.sh --help"
        URL="${2%/}"
        shift
        ;;
      --json) IS_JSON=1 ;;
      --watch)
        WATCH_SECONDS=5
        if [[ "${2:-}" =~ ^[1-9][0-9]*$ ]]; then
          WATCH_SECONDS="$2"
          shift
        fi
        ;;
      --help | -h)
        print_header "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *) fail 78 "the argument is not understood" "command line: $1" "there is no such flag" \
        "health-check.sh --help" ;;
    esac
    shift
  done
}

# --- asking ---------------------------------------------------------------------------------

# ask PATH: sets CODE and BODY; CODE is 000 where nothing answers. Bash itself speaks HTTP/1.0, so
# that no tool is needed; in a container without a network its own Python asks.
ask() {
  local answer host port token=''
  CODE=000 BODY=''
  [[ -z "${HEALTH_TOKEN_FILE:-}" ]] || token="$(cat -- "$HEALTH_TOKEN_FILE" 2>/dev/null || true)"
  if [[ "$URL" == container ]]; then
    answer="$(docker exec "$ID" python3 -I -S -c "$ASK_INSIDE" "$1" "$token" 2>/dev/null)" || return 0
  else
    host="${URL#http://}" port="${URL##*:}"
    host="${host%:*}"
    answer="$(ask_server "$host" "$port" "$1" "$token" 2>/dev/null)" || return 0
  fi
  CODE="${answer%%$'\n'*}"
  BODY="${answer#*$'\n'}"
  [[ "$CODE" =~ ^[1-5][0-9][0-9]$ ]] || CODE=000
}

readonly ASK_INSIDE='import http.client, os, sys
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("HEALTH_PORT") or 8080), timeout=4)
headers = {"Authorization": "Bearer " + sys.argv[2]} if sys.argv[2] else {}
connection.request("GET", sys.argv[1], headers=headers)
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode("utf-8", "replace"))'

# ask_server HOST PORT PATH TOKEN: prints the status code, then the body. A line that does not come
# in time ends it.
ask_server() {
  local line code=000
  exec 3<>"/dev/tcp/$1/$2" || return 1
  printf 'GET %s HTTP/1.0\r\nHost: %s:%s\r\n%s\r\n' "$3" "$1" "$2" \
    "${4:+Authorization: Bearer $4$'\r\n'}" >&3
  IFS= read -r -t "$ANSWER_SECONDS" line <&3 || return 1
  code="${line#* }"
  printf '%s\n' "${code%% *}"
  while IFS= read -r -t "$ANSWER_SECONDS" line <&3; do
    [[ -n "${line%$'\r'}" ]] || break
  done
  while IFS= read -r -t "$ANSWER_SECONDS" line <&3 || [[ -n "$line" ]]; do printf '%s\n' "$line"; done
  exec 3>&-
}

# text KEY JSON, number KEY JSON: the first value of that key; the answers are flat enough for it
text() { grep -o -m 1 "\"$1\": *\"[^\"]*\"" <<<"$2" | head -n 1 | sed 's/^"[^"]*": *"//; s/"$//' || true; }
number() { grep -o -m 1 "\"$1\": *[-0-9.e+]*" <<<"$2" | head -n 1 | sed 's/.*: *//' || true; }

# --- looking --------------------------------------------------------------------------------

# Sets PLACE (container, machine or nothing), ID, STATE and URL.
find_run() {
  local file wanted="$URL_GIVEN"
  ID='' STATE='' PLACE=nothing URL="$wanted"
  if [[ -z "$wanted" ]] && has_engine; then
    ID="$(container_of trainer)"
  fi
  [[ -z "$ID" ]] || find_container
  # A run on the machine itself is newer than a container that has ended.
  if [[ -z "$wanted" && "$STATE" != running && "$STATE" != restarting ]]; then
    file="$(newest_of server.json)"
    if [[ -n "$file" ]] && is_trainer "$(number pid "$(<"$file")")"; then
      PLACE=machine URL="$(text url "$(<"$file")")" STATE=running ID=''
    elif [[ -z "$ID" ]]; then
      file="$(newest_of events.jsonl)"
      [[ -z "$file" ]] || PLACE=machine STATE=ended RUN="$(dirname "$file")"
    fi
  fi
  [[ -n "$URL" ]] || URL="http://127.0.0.1:$(setting HEALTH_PORT 8080)"
}

# Docker publishes no port of a container that has ended, and says so with a failure.
find_container() {
  local published
  PLACE=container
  STATE="$(state_of "$ID" Status)"
  if [[ "$(docker inspect --format '{{.HostConfig.NetworkMode}}' "$ID")" == none ]]; then
    URL=container
    return
  fi
  published="$(docker port "$ID" 8080/tcp 2>/dev/null || true)"
  URL="${published:+http://${published%%$'\n'*}}"
}

# newest_of NAME: prints the newest file of that name among the runs
newest_of() {
  local folder file newest=''
  folder="$(host_path LORA_OUTPUTS ../public/outputs)"
  for file in "$folder/$1" "$folder"/*/"$1"; do
    [[ -r "$file" ]] || continue
    [[ -n "$newest" && ! "$file" -nt "$newest" ]] || newest="$file"
  done
  printf '%s\n' "$newest"
}

# found TEXT REMEDY: something that is not well
found() {
  PROBLEMS+=("$1")
  REMEDIES+=("$2")
}

look_at_container() {
  local health restarts
  [[ "$PLACE" == container ]] || return 0
  health="$(docker inspect --format '{{if .State.Health}}{{.State.Health.Status}}{{end}}' "$ID")"
  restarts="$(docker inspect --format '{{.RestartCount}}' "$ID")"
  EXIT_CODE=''
  CONTAINER="${ID:0:12} is $STATE${health:+ ($health)}, restarted $restarts times"
  case "$STATE" in
    exited | dead)
      EXIT_CODE="$(state_of "$ID" ExitCode)"
      CONTAINER="${ID:0:12} is $STATE, restarted $restarts times, exit code $EXIT_CODE ($(meaning_of "$EXIT_CODE"))"
      judge_end "$(docker logs --tail "$LOG_LINES" "$ID" 2>&1 || true)"
      ;;
    created) look_at_start ;;
    restarting) found "the container crashed and is restarted (exit code $(state_of "$ID" ExitCode))" "./training/run.sh logs" ;;
    running) [[ "$health" != unhealthy ]] || found "Docker finds the container unhealthy" "see /health" ;;
  esac
}

# The trainer waits for preflight, was refused by it, or could not be started by the engine.
look_at_start() {
  local id why
  id="$(container_of preflight)"
  if [[ -n "$id" && "$(state_of "$id" Status)" == exited && "$(state_of "$id" ExitCode)" != 0 ]]; then
    EXIT_CODE="$(state_of "$id" ExitCode)"
    ID="$id"
    judge_end "$(docker logs --tail "$LOG_LINES" "$id" 2>&1 || true)"
  elif why="$(state_of "$ID" Error)" && [[ -n "$why" ]]; then
    OUTCOME=failed
    found "the engine could not start the container: $why" "./training/run.sh names the remedy"
  fi
}

# A run on the machine itself that has ended: its last event holds the exit code.
look_at_folder() {
  local last
  [[ "$PLACE $STATE" == "machine ended" ]] || return 0
  last="$(tail -n 1 "$RUN/events.jsonl" 2>/dev/null || true)"
  EXIT_CODE="$(number exit_code "$last")"
  if [[ -e "$RUN/DONE" ]]; then
    EXIT_CODE=0
  elif [[ -z "$EXIT_CODE" ]]; then
    EXIT_CODE=137
  fi
  judge_end "$(tail -n "$LOG_LINES" "$RUN/train.log" 2>/dev/null || true)"
}

# judge_end LOG: sets OUTCOME from EXIT_CODE, and finds the reason of a run that failed: the block
# that the trainer prints last, or what Docker knows.
judge_end() {
  local what remedy block
  case "$EXIT_CODE" in
    0) OUTCOME=finished && return ;;
    143) OUTCOME=stopped && return ;;
  esac
  OUTCOME=failed
  block="$(last_block "$1")"
  what="$(head -n 1 <<<"$block")"
  remedy="$(sed -n 's/^ *remedy: *//p' <<<"$block")"
  if [[ "$PLACE" == container && "$(state_of "$ID" OOMKilled)" == true ]]; then
    found "the kernel killed a process for memory ($(setting LORA_MEMORY 16g) allowed)" \
      "a larger LORA_MEMORY, or --per_device_train_batch_size 1 --gradient_checkpointing true"
  elif [[ -z "$block" && "$EXIT_CODE" == 137 ]]; then
    found "the run was killed from outside, by docker kill or another SIGKILL" \
      "./training/run.sh resumes from the last checkpoint"
    return
  fi
  [[ -z "$block" && ${#PROBLEMS[@]} -gt 0 ]] ||
    found "${what:-the run ended} (exit code $EXIT_CODE: $(meaning_of "$EXIT_CODE"))" \
      "${remedy:-./training/run.sh logs shows the reason; ./training/run.sh starts it again and resumes}"
}

# last_block LOG: prints the last paragraph if it ends with an exit code
last_block() {
  awk '/^[ \t]*$/ { text = "" } /[^ \t]/ { text = text $0 "\n" } /^exit code [1-9]/ { block = text } END { printf "%s", block }' <<<"$1"
}

meaning_of() {
  case "$1" in
    0) printf 'finished' ;;
    65) printf 'data' ;;
    69) printf 'model, hub or device unavailable' ;;
    70) printf 'internal fault or stalled worker' ;;
    74) printf 'disk full or I/O' ;;
    75) printf 'another run holds this output' ;;
    77) printf 'no permission' ;;
    78) printf 'configuration' ;;
    137) printf 'killed, for memory or from outside' ;;
    143) printf 'stopped by a signal' ;;
    *) printf 'see the log' ;;
  esac
}

look_at_server() {
  local path
  CODES=() HEALTH='' METRICS=''
  case "$STATE" in exited | dead | created | ended) return 0 ;; esac
  for path in "${ENDPOINTS[@]}"; do
    ask "$path"
    CODES+=("$path=$CODE")
    case "$path $CODE" in
      "/health "*) HEALTH="$BODY" ;;
      "/metrics 200") METRICS="$BODY" ;;
    esac
    case "$path $CODE" in
      *" 200") ;;
      *" 000")
        if [[ "$PLACE" == nothing ]]; then
          found "no run was found, and nothing answers at $URL" "./training/run.sh starts one"
        else
          found "$URL does not answer" "./training/run.sh logs; is the port another one? HEALTH_PORT=..."
        fi
        return
        ;;
      "/health 503") found "$(text reason "$BODY")" "$(text remedy "$BODY")" ;;
      *" 401") found "$path wants a token" "HEALTH_TOKEN_FILE=FILE ./training/health-check.sh" ;;
      *) found "$path answers $CODE" "./training/run.sh logs" ;;
    esac
  done
}

look_at_gpu() {
  local query=(nvidia-smi '--query-gpu=name,memory.used,memory.total' '--format=csv,noheader')
  GPU=''
  if [[ "$PLACE" == container && "$STATE" == running ]]; then
    query=(docker exec "$ID" "${query[@]}")
  elif ! command -v nvidia-smi >/dev/null; then
    return 0
  fi
  GPU="$("${query[@]}" 2>/dev/null)" || GPU=''
  GPU="${GPU//$'\n'/; }"
}

# The last lines of the log that speak of an error.
look_at_log() {
  local log=''
  if [[ "$PLACE" == container ]]; then
    log="$(docker logs --tail "$LOG_LINES" "$ID" 2>&1 || true)"
  elif [[ "$PLACE" == machine ]]; then
    log="$(tail -n "$LOG_LINES" "${RUN:-$(dirname "$(newest_of server.json)")}/train.log" 2>/dev/null || true)"
  fi
  [[ "$OUTCOME" != finished ]] || return 0
  mapfile -t ERRORS < <(grep -iE 'error|traceback|exit code [1-9]|killed|out of memory|no space' <<<"$log" | tail -n 5)
}

# --- telling --------------------------------------------------------------------------------

json_string() {
  local text="$1"
  text="${text//\\/\\\\}" text="${text//\"/\\\"}" text="${text//$'\t'/ }" text="${text//$'\r'/}"
  printf '"%s"' "${text//$'\n'/\\n}"
}

json_list() {
  local item separator=''
  printf '['
  for item; do
    printf '%s%s' "$separator" "$(json_string "$item")"
    separator=', '
  done
  printf ']'
}

tell_json() {
  local item separator='' index
  printf '{"is_healthy": %s, "place": "%s", "state": %s, "outcome": %s, "exit_code": %s, "url": %s, "endpoints": {' \
    "$( ((${#PROBLEMS[@]})) && echo false || echo true)" "$PLACE" "$(json_string "$STATE")" \
    "$(json_string "$OUTCOME")" "${EXIT_CODE:-null}" "$(json_string "$URL")"
  for item in ${CODES[@]+"${CODES[@]}"}; do
    printf '%s%s: %d' "$separator" "$(json_string "${item%=*}")" "$((10#${item#*=}))"
    separator=', '
  done
  printf '}, "gpu": %s, "health": %s, "problems": [' "$(json_string "$GPU")" "${HEALTH:-null}"
  separator=''
  for index in ${PROBLEMS[@]+"${!PROBLEMS[@]}"}; do
    printf '%s{"what": %s, "remedy": %s}' "$separator" "$(json_string "${PROBLEMS[index]}")" \
      "$(json_string "${REMEDIES[index]}")"
    separator=', '
  done
  printf '], "recent_errors": %s}\n' "$(json_list ${ERRORS[@]+"${ERRORS[@]}"})"
}

outcome_text() {
  case "$OUTCOME" in
    finished) printf ': the run has finished; results: %s' "${RUN:-$(host_path LORA_OUTPUTS ../public/outputs)}" ;;
    stopped) printf ': the run was stopped; ./training/run.sh resumes it' ;;
  esac
}

tell() {
  local index
  printf '%-10s %s\n' "run" "$PLACE${STATE:+, $STATE}"
  [[ -z "${CONTAINER:-}" ]] || printf '%-10s %s\n' "container" "$CONTAINER"
  ((${#CODES[@]} == 0)) || printf '%-10s %s: %s\n' "server" "$URL" "${CODES[*]}"
  [[ -z "$HEALTH" ]] || printf '%-10s %s\n' "phase" "$(text phase "$HEALTH")"
  [[ -z "$METRICS" ]] || printf '%-10s step %s of %s, loss %s\n' "training" "$(number current_step "$METRICS")" \
    "$(number total_steps "$METRICS")" "$(number last_loss "$METRICS")"
  printf '%-10s %s\n' "GPU" "${GPU:-none}"
  for index in ${ERRORS[@]+"${!ERRORS[@]}"}; do
    printf '%-10s %s\n' "log" "${ERRORS[index]}"
  done
  if ((${#PROBLEMS[@]} == 0)); then
    printf '%shealthy%s%s\n' "$BOLD" "$PLAIN" "$(outcome_text)"
    return
  fi
  for index in "${!PROBLEMS[@]}"; do
    printf '%s%s%s\n  remedy: %s\n' "$RED" "${PROBLEMS[index]}" "$PLAIN" "${REMEDIES[index]}"
  done
}

look() {
  PROBLEMS=() REMEDIES=() ERRORS=() CONTAINER='' OUTCOME='' EXIT_CODE='' RUN=''
  find_run
  look_at_container
  look_at_folder
  look_at_server
  look_at_gpu
  look_at_log
  if ((IS_JSON)); then tell_json; else tell; fi
  ((${#PROBLEMS[@]} == 0))
}

health_check_main() {
  read_arguments "$@"
  URL_GIVEN="$URL"
  while ((WATCH_SECONDS)); do
    ((IS_JSON)) || printf '%s  %s\n' "$BOLD$(date +%H:%M:%S)$PLAIN" "every $WATCH_SECONDS s"
    look || true
    sleep "$WATCH_SECONDS"
  done
  look
}

health_check_main "$@"
