#!/usr/bin/env bash
# Which stack and which Python this machine can use, and how the scripts talk. It is sourced, by
# environment.sh for one, and only defines functions.

readonly STACKS="$TRAINING/src/lora_trainer/model/stacks.csv"

if [[ -t 2 && -z "${NO_COLOR:-}" && "${TERM:-dumb}" != dumb ]]; then
  readonly BOLD=$'\e[1m' RED=$'\e[31m' PLAIN=$'\e[0m'
else
  readonly BOLD='' RED='' PLAIN=''
fi

say() { printf '%s\n' "$*" >&2; }

# fail CODE WHAT WHERE WHY REMEDY: the same block that the trainer ends with, in errors.py's words
fail() {
  local meaning
  meaning="$(sed -n "/^MEANINGS/,/^}/ s/^ *$1: \"\(.*\)\",/\1/p" "$TRAINING/src/lora_trainer/errors.py")"
  say "$RED$BOLD$2$PLAIN"
  say "  where:  $3"
  say "  why:    $4"
  say "  remedy: $5"
  say "exit code $1 ($meaning)"
  exit "$1"
}

# need_value FLAG VALUE...: the value of a flag must follow it
need_value() {
  (($# > 1)) || fail 78 "$1 needs a value" "command line" "nothing follows it" "${0##*/} --help"
}

# print_header FILE: its opening comment, which is its manual
print_header() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# --- Python ---------------------------------------------------------------------------------

python_candidates() {
  local version versions='3.12 3.11 3.13 3.14 3.10' first=python3
  [[ "${STACK:-}" != cu121 ]] || versions='3.10 3.11' first=''
  [[ -z "${LORA_PYTHON:-}" ]] || { printf '%s\n' "$LORA_PYTHON" && return; }
  # shellcheck disable=SC2046,SC2086 # lists of words
  printf '%s\n' $first $(printf 'python%s ' $versions) python3 python
  for version in $versions; do
    compgen -G "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version.*/bin/python3" || true
  done
}

# Prints "MINOR EXECUTABLE" of a CPython from 3.10 to 3.LAST, or fails with the reason.
readonly PYTHON_PROBE='
import sys
last = int(sys.argv[1])
if sys.version_info[0] != 3 or sys.implementation.name != "cpython" or sys.maxsize < 2**32:
    sys.exit("no 64-bit CPython 3")
if not 10 <= sys.version_info[1] <= last:
    sys.exit("version %d.%d, needed is 3.10 to 3.%d" % (*sys.version_info[:2], last))
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit("it lacks the module %s (on Debian and Ubuntu: apt-get install python3-venv)" % error.name)
print(sys.version_info[1], sys.executable)
'

# Sets PYTHON to the first candidate that is no 3.10, else to the first 3.10: transformers 5
# wants 3.11. The stack cu121 is made for 3.10, as its container has, and works with 3.11.
find_python() {
  local candidate found second='' reasons='' last=14 is_cu121=0
  [[ "${STACK:-}" != cu121 ]] || last=11 is_cu121=1
  while IFS= read -r candidate; do
    command -v "$candidate" >/dev/null || continue
    if found="$("$candidate" -c "$PYTHON_PROBE" "$last" 2>&1)"; then
      PYTHON="${found#* }"
      (((${found%% *} == 10) != is_cu121)) || return 0
      second="${second:-$PYTHON}"
    else
      found="$(tail -n 1 <<<"$found")"
      reasons+="${reasons:+; }$candidate: ${found:-it does not run}"
    fi
  done < <(python_candidates)
  PYTHON="$second"
  [[ -n "$PYTHON" ]] || fail 69 "no usable Python was found${STACK:+ for the stack $STACK}" \
    "${LORA_PYTHON:+LORA_PYTHON=$LORA_PYTHON, }PATH=$PATH" \
    "${reasons:-no command python3 is on the PATH}" "$(python_remedy)"
}

python_remedy() {
  if [[ "${STACK:-}" == cu121 ]]; then
    printf 'set LORA_PYTHON=/path/to/python3.10 (pyenv install 3.10), or use another stack: LORA_STACK=cpu\n'
  else
    printf 'install Python 3.12 (Debian, Ubuntu: apt-get install python3 python3-venv), or set LORA_PYTHON=/path/to/python3\n'
  fi
}

# --- which stack ----------------------------------------------------------------------------

# Prints the stack that this machine's GPU and driver serve, or fails and says why not. A container
# needs no more than that.
driver_stack() {
  local driver capability stack from least most highest needs=''
  command -v nvidia-smi >/dev/null || return 1
  IFS=', ' read -r driver capability < <(
    nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null
  ) || return 1
  [[ "$driver" =~ ^[0-9]+\. && "$capability" =~ ^[0-9]+\.[0-9]+$ ]] || return 1
  while IFS=, read -r stack from least most; do
    highest="${most:-99.9}"
    if ((${driver%%.*} >= from && ${capability/./} >= ${least/./} && ${capability/./} <= ${highest/./})); then
      printf '%s\n' "$stack"
      return
    fi
    needs+="${needs:+, or }driver $from and $least${most:+ to $most} (stack $stack)"
  done < <(grep -v '^#' "$STACKS")
  say "The GPU is not used: driver $driver, compute capability $capability; torch needs $needs." \
    "Remedy: update the driver, if the GPU is new enough."
  return 1
}

# Prints the stack whose torch can use a GPU of this machine with a Python of this machine, or fails.
gpu_stack() {
  local stack
  stack="$(driver_stack)" || return 1
  if [[ "$stack" == cu121 ]] && ! (STACK=cu121 && find_python) 2>/dev/null; then
    say "The GPU is not used: its driver supports only the stack cu121, which needs Python 3.10 or 3.11." \
      "Remedy: LORA_PYTHON=/path/to/python3.10, or a newer driver."
    return 1
  fi
  printf '%s\n' "$stack"
}

# known_stack NAME
known_stack() {
  [[ "$1" =~ ^(cpu|current|cu121)$ ]] || fail 78 "unknown stack" "LORA_STACK=$1" \
    "it must be cpu, current or cu121" "unset LORA_STACK, or correct it in .env.training"
}

# Sets STACK and VENV. The stack cu121 has a folder of its own, so that it can stand beside.
choose_stack() {
  known_stack "${LORA_STACK:-cpu}"
  STACK="${LORA_STACK:-}"
  if [[ -z "$STACK" && "$(uname -s)" != Linux ]]; then
    STACK=current # elsewhere than on Linux the registry's only build
  elif [[ -z "$STACK" ]]; then
    STACK="$(gpu_stack)" || STACK=cpu
  fi
  VENV="${LORA_VENV:-$TRAINING/.venv}"
  [[ -n "${LORA_VENV:-}" || "$STACK" != cu121 ]] || VENV="$TRAINING/.venv-cu121"
  [[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
}
