#!/usr/bin/env bash
# Run every check that this machine can run: ./training/test.sh
#
# Creates training/.venv as run.sh does, adds the tests' packages, then runs ruff (format and lint),
# mypy, shellcheck, shfmt, hadolint, the check of the lock files and pytest. All of them run even if
# some fail; the last line names the failures. Tests marked `gpu` need a GPU, those marked `browser`
# chromium and chromedriver, those marked `docker` a Docker engine.
#
# Usage: test.sh [--fast] [--stack] [PYTEST ARGUMENT ...]
#
#   --fast   leave out tests marked `slow`: long runs, mostly of the embedded model
#   --stack  run only what differs between stacks: no linters, no browser or docker tests, and none
#            marked `any_stack`
#   --help   this text
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

FAILED=()

# check NAME COMMAND...
check() {
  local name="$1" begun=$SECONDS
  shift
  say "${BOLD}$name$PLAIN"
  "$@" || FAILED+=("$name")
  say "  $((SECONDS - begun)) s"
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
  check locks check_locks
}

check_shell() {
  local scripts=("$TRAINING"/*.sh "$TRAINING"/*/*.sh "$TRAINING"/../.ci/*)
  check shellcheck "$VENV/bin/shellcheck" --external-sources "${scripts[@]}"
  check shfmt "$VENV/bin/shfmt" --diff --indent 2 --case-indent "${scripts[@]}"
}

# Without a registry in reach the locks are checked by tests/unit/test_locks.py alone.
check_locks() {
  local status=0
  PATH="$VENV/bin:$PATH" "$TRAINING/requirements/lock.sh" --check || status=$?
  ((status == 69)) || return "$status"
  say "  not resolved: no package registry is in reach"
}

# leave_out MARKER WHY
leave_out() {
  say "$2: tests marked $1 are left out"
  MARKS+=("not $1")
}

# Tests run side by side, a core each and a file at a time, the long ones' folders first; those
# that take every core, or a whole engine, run alone. The user's own choice runs as it is given.
check_tests() {
  local pytest=("$VENV/bin/python" -m pytest --durations 20 --durations-min 1) alone="slow or docker or browser" marks=""
  MARKS=()
  gpu_stack >/dev/null || leave_out gpu "No NVIDIA GPU can be used here"
  if ((! EVERYTHING)); then
    MARKS+=("not (any_stack or browser or docker)")
  else
    { command -v chromium && command -v chromedriver; } >/dev/null ||
      leave_out browser "No Chromium here (apt-get install chromium chromium-driver)"
    [[ "${LORA_REQUIRE_DOCKER:-0}" == 1 ]] || docker version >/dev/null 2>&1 ||
      leave_out docker "No Docker engine answers here"
  fi
  ((ALL)) || MARKS+=("not slow")
  ((! ${#MARKS[@]})) || marks="$(printf ' and %s' "${MARKS[@]}")"
  if (($#)); then
    check pytest "${pytest[@]}" -m "${marks# and }" "$@"
    return
  fi
  check "pytest, side by side" "${pytest[@]}" -n logical --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder -m "not ($alone)$marks"
  check "pytest, one by one" some_or_none "${pytest[@]}" -m "($alone)$marks"
}

some_or_none() { "$@" || (($? == 5)); } # pytest's exit code where no test was chosen

test_main() {
  local arguments=("$@")
  ALL=1 EVERYTHING=1
  while (($#)); do
    case "$1" in
      --help | -h)
        print_header "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --fast) ALL=0 ;;
      --stack) EVERYTHING=0 ;;
      *) break ;;
    esac
    shift
  done
  prepare_environment --tests "$TRAINING/test.sh" ${arguments[@]+"${arguments[@]}"}
  cd "$TRAINING"
  ((! EVERYTHING)) || check_sources
  check_tests "$@"
  if ((${#FAILED[@]})); then
    say "${RED}${BOLD}Failed: $(printf '%s, ' "${FAILED[@]}" | sed 's/, $//')$PLAIN"
    exit 1
  fi
  say "${BOLD}All passed$PLAIN"
}

test_main "$@"
