#!/usr/bin/env bash
# Run every check that this machine can run: ./training/test.sh
#
# Creates training/.venv as run.sh does, adds the tests' packages, then runs ruff (format and lint),
# mypy, shellcheck, shfmt, hadolint, the check of the lock files and pytest. All of them run even if
# some fail; the last line names the failures. tests/gpu needs a GPU, tests/browser chromium
# and chromedriver, tests/docker a Docker engine.
#
# Usage: test.sh [--quick] [--stack] [PYTEST ARGUMENT ...]
#
#   --quick  run the linters and tests/quick: what needs no torch, and one short run
#   --stack  run only what differs between stacks: no linters, no browser or docker tests, and none
#            marked `any_stack`
#   --help   this text
#
# Not part of any of these, since it installs Ray and SkyPilot, and needs root, slurm-wlm and munge
# (what is missing is skipped and named; it takes some 20 minutes):
#
#   sudo ./training/test.sh tests/engines
#
# Variables:
#   LORA_STACK, LORA_PYTHON, LORA_VENV   as for run.sh
#   LORA_REQUIRE_DOCKER    1: a docker test that cannot run is a failure
#   LORA_TEST_BASE_IMAGE   base of the image that the docker tests build (default: the cpu stack's)
#   LORA_TEST_CA_CERT, LORA_TEST_WHEELS   for that build: build.sh's --ca-cert and --wheels
#   PYTEST_TIMEOUT         seconds that a test may take (default: 600); marks in the tests allow longer
# Exit codes: 0 all passed, 1 something failed, 69, 74, 75, 77, 78 and 143 as for run.sh
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

FAILED=() BESIDE=()

# check NAME COMMAND...
check() {
  local name="$1" begun=$SECONDS
  shift
  say "${BOLD}$name$PLAIN"
  "$@" || FAILED+=("$name")
  say "  $((SECONDS - begun)) s"
}

# beside NAME COMMAND...: what mostly waits runs while the checks go on; report_beside ends with it
beside() {
  local log
  log="$(mktemp)"
  "${@:2}" >"$log" 2>&1 &
  BESIDE+=("$! $1 $log")
}

report_beside() {
  local entry process name log
  for entry in ${BESIDE[@]+"${BESIDE[@]}"}; do
    read -r process name log <<<"$entry"
    check "$name" wait "$process"
    cat -- "$log"
    rm -f -- "$log"
  done
}

check_sources() {
  check "ruff format" "$VENV/bin/ruff" format --check .
  check "ruff check" "$VENV/bin/ruff" check .
  check mypy "$VENV/bin/mypy"
  check_shell
  if [[ -x "$VENV/bin/hadolint" ]]; then
    check hadolint "$VENV/bin/hadolint" "$TRAINING/Dockerfile"
  else
    say "hadolint is not installed: the Dockerfile is not linted"
  fi
  ((IS_QUICK)) || beside locks check_locks
}

check_shell() {
  local scripts=("$TRAINING"/*.sh "$TRAINING"/*/*.sh "$TRAINING"/deploy/slurm/* "$TRAINING"/../.ci/*)
  check shellcheck "$VENV/bin/shellcheck" --external-sources "${scripts[@]}"
  check shfmt "$VENV/bin/shfmt" --diff --indent 2 --case-indent "${scripts[@]}"
}

# Without a registry in reach the locks are checked by tests/quick/project/test_locks.py alone.
check_locks() {
  local status=0
  PATH="$VENV/bin:$PATH" nice "$TRAINING/requirements/lock.sh" --check || status=$?
  ((status == 69)) || return "$status"
  say "  not resolved: no package registry is in reach"
}

# can_run TIER: whether this machine can; if not, says why
can_run() {
  local missing=''
  case "$1" in
    gpu) gpu_stack >/dev/null || missing="No NVIDIA GPU can be used here" ;;
    browser)
      { command -v chromium && command -v chromedriver; } >/dev/null ||
        missing="No Chromium here (apt-get install chromium chromium-driver)"
      ;;
    docker)
      [[ "${LORA_REQUIRE_DOCKER:-0}" == 1 ]] || docker version >/dev/null 2>&1 ||
        missing="No Docker engine answers here"
      ;;
  esac
  [[ -n "$missing" ]] || return 0
  say "$missing: tests/$1 is left out"
  return 1
}

# Tiny models run side by side, a core each and a file at a time. Runs of the embedded model take
# every core, and go one by one; beside them, and before them in the queue for a core, run the
# containers, which mostly wait. The user's own choice runs as it is given.
check_tests() {
  local pytest=("$VENV/bin/python" -m pytest --durations 20 --durations-min 1) alone=(tests/e2e)
  local side_by_side=(-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
  ((EVERYTHING)) || pytest+=(-m "not any_stack")
  if (($#)); then
    check pytest "${pytest[@]}" "$@"
    return
  fi
  check tests/quick "${pytest[@]}" "${side_by_side[@]}" tests/quick
  ((! IS_QUICK)) || return 0
  check "tests/process tests/model" "${pytest[@]}" "${side_by_side[@]}" tests/process tests/model
  ((! EVERYTHING)) || ! can_run browser || alone+=(tests/browser)
  ! can_run gpu || alone+=(tests/gpu)
  ((! EVERYTHING)) || ! can_run docker || beside tests/docker "${pytest[@]}" tests/docker
  check "${alone[*]}" nice "${pytest[@]}" "${alone[@]}"
}

test_main() {
  local arguments=("$@")
  IS_QUICK=0 EVERYTHING=1
  while (($#)); do
    case "$1" in
      --help | -h)
        print_header "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --quick) IS_QUICK=1 ;;
      --stack) EVERYTHING=0 ;;
      *) break ;;
    esac
    shift
  done
  prepare_environment --tests "$TRAINING/test.sh" ${arguments[@]+"${arguments[@]}"}
  cd "$TRAINING"
  ((! EVERYTHING)) || check_sources
  check_tests "$@"
  report_beside
  if ((${#FAILED[@]})); then
    say "${RED}${BOLD}Failed: $(printf '%s, ' "${FAILED[@]}" | sed 's/, $//')$PLAIN"
    exit 1
  fi
  say "${BOLD}All passed$PLAIN"
}

test_main "$@"
