#!/usr/bin/env bash
# Check everything that this machine can check: ./training/test.sh
#
# Makes training/.venv as run.sh does, adds the tests' own packages, then runs ruff (format and
# lint), mypy, shellcheck, shfmt, the check of the locks and pytest. All of them run, whatever
# fails; the last lines say what did. Tests marked `gpu` run where a GPU is, those marked
# `browser` where chromium and chromedriver are, those marked `docker` where an engine answers.
#
# Usage: test.sh [--fast] [PYTEST ARGUMENT ...]
#
#   --fast   leave out the tests marked `slow`, which train the embedded model
#   --help   this text
#
# Variables:
#   LORA_STACK, LORA_PYTHON, LORA_VENV   as for run.sh
#   LORA_REQUIRE_DOCKER    1: a docker test that cannot run is a failure
#   LORA_TEST_BASE_IMAGE   the base of the image that the docker tests build (default: the cpu stack's)
#   LORA_TEST_CA_CERT, LORA_TEST_WHEELS   for that build: build.sh's --ca-cert and --wheels
# Exit codes: 0 all passed, 1 something failed, 69, 74 and 77 as for run.sh
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

FAILED=()

# check NAME COMMAND...
check() {
  local name="$1" begun=$SECONDS
  shift
  say "${BOLD}$name$PLAIN"
  "$@" || FAILED+=("$name")
  say "  $((SECONDS - begun)) s"
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

check_tests() {
  local marks=()
  if ! gpu_stack >/dev/null; then
    say "No NVIDIA GPU can be used here: tests marked gpu are left out"
    marks+=("not gpu")
  fi
  if ! { command -v chromium && command -v chromedriver; } >/dev/null; then
    say "No Chromium here (apt-get install chromium chromium-driver): tests marked browser are left out"
    marks+=("not browser")
  fi
  if [[ "${LORA_REQUIRE_DOCKER:-0}" != 1 ]] && ! docker version >/dev/null 2>&1; then
    say "No Docker engine answers here: tests marked docker are left out"
    marks+=("not docker")
  fi
  if [[ "${1:-}" == --fast ]]; then
    marks+=("not slow")
    shift
  fi
  if ((${#marks[@]})); then
    set -- -m "$(printf ' and %s' "${marks[@]}" | sed 's/^ and //')" "$@"
  fi
  check pytest "$VENV/bin/python" -m pytest "$@"
}

test_main() {
  if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    print_header "${BASH_SOURCE[0]}"
    exit 0
  fi
  prepare_test_environment
  cd "$TRAINING"
  check "ruff format" "$VENV/bin/ruff" format --check .
  check "ruff check" "$VENV/bin/ruff" check .
  check mypy "$VENV/bin/mypy"
  check_shell
  check locks check_locks
  check_tests "$@"
  if ((${#FAILED[@]})); then
    say "${RED}${BOLD}Failed: $(printf '%s, ' "${FAILED[@]}" | sed 's/, $//')$PLAIN"
    exit 1
  fi
  say "${BOLD}All passed$PLAIN"
}

test_main "$@"
