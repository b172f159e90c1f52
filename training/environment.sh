#!/usr/bin/env bash
# Makes training/.venv from the lock files. Sourced by run.sh, test.sh and .ci/run, which set
# the shell's options; it only defines functions, of which they call prepare_environment.
#
# The environment is ready when its stamp names the lock files, the Python and the place that
# it was made from. The stamp goes first and comes last, so an interrupted installation is
# seen and done over. Whoever installs holds $VENV.lock alone; whoever runs shares it until
# the process ends (the descriptor survives exec), so no run loses the packages under it.

TRAINING="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV="${LORA_VENV:-$TRAINING/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
readonly TRAINING
readonly LOCKS="$TRAINING/requirements"
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly CPU_BYTES=$((3 * 1000 ** 3)) CUDA_BYTES=$((10 * 1000 ** 3))
# torch 2.13.0 comes with CUDA 13, which begins with this driver and this GPU generation.
readonly CUDA_DRIVER=580 CUDA_CAPABILITY=75

if [[ -t 2 && -z "${NO_COLOR:-}" && "${TERM:-dumb}" != dumb ]]; then
  readonly BOLD=$'\e[1m' RED=$'\e[31m' PLAIN=$'\e[0m' CLEAR_LINE=$'\r\e[K'
else
  readonly BOLD='' RED='' PLAIN='' CLEAR_LINE=''
fi

say() { printf '%s\n' "$*" >&2; }

# fail CODE WHAT WHERE WHY REMEDY: the same block that the trainer ends with
fail() {
  local meaning
  case "$1" in
    69) meaning="unavailable" ;;
    74) meaning="disk full or I/O" ;;
    75) meaning="another run holds this" ;;
    77) meaning="no permission" ;;
    78) meaning="configuration" ;;
    143) meaning="stopped by signal" ;;
    *) meaning="internal fault" ;;
  esac
  say "$RED$BOLD$2$PLAIN"
  say "  where:  $3"
  say "  why:    $4"
  say "  remedy: $5"
  say "exit code $1 ($meaning)"
  exit "$1"
}

# print_header FILE: its opening comment, which is its manual
print_header() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# --- Python ---------------------------------------------------------------------------------

python_candidates() {
  local version path
  if [[ -n "${LORA_PYTHON:-}" ]]; then
    printf '%s\n' "$LORA_PYTHON"
    return
  fi
  printf '%s\n' python3 python3.12 python3.11 python3.13 python3.14 python3.10 python
  for version in 3.12 3.11 3.13 3.14 3.10; do
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python3; do
      [[ -x "$path" ]] && printf '%s\n' "$path"
    done
  done
  return 0
}

# Prints "MINOR EXECUTABLE" of a CPython 3, or fails with the reason.
readonly PYTHON_PROBE='
import sys
if sys.version_info[0] != 3 or sys.implementation.name != "cpython" or sys.maxsize < 2**32:
    sys.exit("no 64-bit CPython 3")
if not 10 <= sys.version_info[1] <= 14:
    sys.exit("version %d.%d, needed is 3.10 to 3.14" % sys.version_info[:2])
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit("it lacks the module %s (on Debian and Ubuntu: apt-get install python3-venv)" % error.name)
print(sys.version_info[1], sys.executable)
'

# Sets PYTHON to the first candidate of 3.11 or newer, else to the first 3.10.
find_python() {
  local candidate found older='' reasons=''
  while IFS= read -r candidate; do
    command -v "$candidate" >/dev/null || continue
    if found="$("$candidate" -c "$PYTHON_PROBE" 2>&1)"; then
      PYTHON="${found#* }"
      [[ "${found%% *}" == 10 ]] || return 0
      older="${older:-$PYTHON}"
    else
      found="$(tail -n 1 <<<"$found")"
      reasons+="${reasons:+; }$candidate: ${found:-it does not run}"
    fi
  done < <(python_candidates)
  PYTHON="$older"
  [[ -n "$PYTHON" ]] || fail 69 "no usable Python was found" \
    "${LORA_PYTHON:+LORA_PYTHON=$LORA_PYTHON, }PATH=$PATH" \
    "${reasons:-no command python3 is on the PATH}" \
    "install Python 3.12 (Debian, Ubuntu: apt-get install python3 python3-venv), or set LORA_PYTHON=/path/to/python3"
}

# --- which torch ----------------------------------------------------------------------------

# Prints nothing and succeeds if torch's CUDA build can use a GPU of this machine.
has_usable_gpu() {
  local driver capability
  command -v nvidia-smi >/dev/null || return 1
  IFS=', ' read -r driver capability < <(
    nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null
  ) || return 1
  [[ "$driver" =~ ^[0-9]+\. && "$capability" =~ ^[0-9]+\.[0-9]+$ ]] || return 1
  if ((${driver%%.*} < CUDA_DRIVER || ${capability/./} < CUDA_CAPABILITY)); then
    say "The GPU is not used: driver $driver, compute capability $capability; torch 2.13.0 needs" \
      "driver $CUDA_DRIVER and 7.5. Remedy: update the driver, if the GPU is new enough."
    return 1
  fi
}

# Prints cpu or cuda.
wanted_torch() {
  if [[ -n "${LORA_TORCH:-}" ]]; then
    printf '%s\n' "$LORA_TORCH"
  elif [[ "$(uname -s)" != Linux ]] || has_usable_gpu; then
    printf 'cuda\n' # elsewhere than on Linux the registry's only build
  else
    printf 'cpu\n'
  fi
}

# --- state ----------------------------------------------------------------------------------

# lock PYTHON DESCRIPTOR NAME...: flock(2) on a descriptor of this shell, e.g. EX NB. Fails if
# another process holds it; a file system that knows no locks is used without.
lock() {
  local python="$1"
  shift
  "$python" -I -S -c 'import fcntl, sys
try:
    fcntl.flock(int(sys.argv[1]), sum(getattr(fcntl, "LOCK_" + name) for name in sys.argv[2:]))
except BlockingIOError:
    sys.exit(1)
except OSError:
    pass' "$@"
}

# digest LOCK_FILE...: what the stamp of an environment made from these says
digest() {
  "$VENV/bin/python" -I -S -c 'import hashlib, sys
total = hashlib.sha256(repr((sys.version, sys.argv[1:3])).encode())
for name in sys.argv[3:]:
    with open(name, "rb") as file:
        total.update(hashlib.sha256(file.read()).digest())
print(total.hexdigest())' "$VENV" "$TRAINING" "$@" 2>/dev/null
}

trainer_digest() {
  digest "$LOCKS/cpu.txt" "$LOCKS/torch.txt" "$LOCKS/torch-cpu.txt" "$LOCKS/embedded.txt"
}

# The CUDA build serves a CPU too; a CPU build is replaced once a GPU is there.
is_ready() {
  local stamp='' torch=''
  [[ -r "$VENV/stamp" ]] && read -r stamp torch <"$VENV/stamp" || return 1
  [[ "$stamp" == "$(trainer_digest)" ]] || return 1
  [[ "$torch" == cuda || "$(wanted_torch)" == cpu ]]
}

write_stamp() {
  printf '%s\n' "$2" >"$1.new"
  mv -f -- "$1.new" "$1"
}

# Tells apart a place that may not be written and one that cannot be.
refuse_place() {
  local code=74
  case "$1" in
    *"ermission denied"* | *"Read-only file system"* | *"not permitted"*) code=77 ;;
  esac
  fail "$code" "the environment cannot be written" "$VENV" "$1" \
    "make room or give access there, or: LORA_VENV=/another/folder/venv ${0##*/}"
}

open_lock() {
  local why
  if why="$(export LC_ALL=C && { mkdir -p "$(dirname "$VENV")" && : >>"$VENV.lock"; } 2>&1)"; then
    exec 9>>"$VENV.lock"
  elif is_ready; then
    exec 9<"$VENV/stamp" # an environment that is only for reading: no one installs there
  else
    refuse_place "${why##*: }"
  fi
}

# Returns with the lock held alone, or shared once another start has made the environment.
lock_alone() {
  lock "$PYTHON" 9 UN
  until lock "$PYTHON" 9 EX NB; do
    if [[ -e "$VENV/stamp" ]] && ! is_ready; then
      fail 75 "the environment must be renewed, but a run is using it" "$VENV" \
        "the lock files, the place or the GPU changed since that run started" \
        "wait for the run to end, or: LORA_VENV=/another/folder/venv ${0##*/}"
    fi
    say "Another start is preparing $VENV; waiting for it"
    lock "$PYTHON" 9 SH
    ! is_ready || return 0
    lock "$PYTHON" 9 UN
  done
}

# --- installation ---------------------------------------------------------------------------

check_disk() {
  local free
  free="$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 { print $4 }')"
  [[ "$free" =~ ^[0-9]+$ ]] || return 0
  free=$((free * 1024))
  if ((free < $1)); then
    fail 74 "too little disk space for the environment" "$VENV" \
      "$((free / 1000 ** 2)) MB are free, $(($1 / 1000 ** 2)) MB are needed" \
      "free some space, or: LORA_VENV=/a/roomier/folder/venv ${0##*/}"
  fi
}

# try_pip ARGUMENT...: in the background, so that a signal is answered at once. On a terminal
# what pip is at is shown while it works.
try_pip() {
  local status=0
  LOG_START="$(wc -l <"$LOG")"
  PYTHONUNBUFFERED=1 "$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --no-user --no-deps \
    --no-compile "$@" >>"$LOG" 2>&1 &
  CHILD=$!
  while [[ -n "$CLEAR_LINE" ]] && kill -0 "$CHILD" 2>/dev/null; do
    printf '%s    %.72s' "$CLEAR_LINE" \
      "$(grep -E '^ *(Collecting|Downloading|Installing) ' "$LOG" | tail -n 1)" >&2
    sleep 0.2
  done
  printf '%s' "$CLEAR_LINE" >&2
  wait "$CHILD" || status=$?
  CHILD=''
  return "$status"
}

# Ends with the cause of pip's last failure, as far as its output tells.
explain_pip() {
  local output why
  output="$(tail -n "+$((LOG_START + 1))" "$LOG")"
  why="$(grep -E '^ *(ERROR|error)' <<<"$output" | tail -n 1 || true)"
  case "$output" in
    *"No space left"* | *"Errno 28"* | *"quota exceeded"*)
      fail 74 "the disk is full" "$VENV" "${why:-no space left}" \
        "free some space there and in ${TMPDIR:-/tmp}, then start again"
      ;;
    *"Errno 13"* | *"Permission denied"* | *"Read-only file system"*)
      fail 77 "the environment cannot be written" "$VENV" "${why:-permission denied}" \
        "LORA_VENV=/a/writable/folder/venv ${0##*/}"
      ;;
    *"DO NOT MATCH THE HASHES"*)
      fail 69 "a package differs from the lock files" "$LOG" \
        "its sha256 is not the one that was locked: a damaged download, or a changed package" \
        "pip cache purge, then start again; if it stays, do not trust the package index"
      ;;
  esac
  fail 69 "$1 could not be installed" "$LOG" "${why:-pip failed}" \
    "check the network and pip's settings (pip config list), then start again"
}

install() {
  local what="$1"
  shift
  say "  $what"
  try_pip "$@" || explain_pip "$what"
}

# Tries the user's own sources, then PyTorch's; what those cannot give is much larger.
install_torch() {
  if [[ "$1" == cpu ]]; then
    say "  torch 2.13.0 for the CPU"
    try_pip -r "$LOCKS/torch-cpu.txt" && return
    tail -n "+$((LOG_START + 1))" "$LOG" | grep -q "No matching distribution" || explain_pip torch
    try_pip --extra-index-url "$TORCH_CPU_INDEX" -r "$LOCKS/torch-cpu.txt" && return
    say "  torch's CPU build is out of reach; taking the registry's, with CUDA: 3 GB to download"
    check_disk "$CUDA_BYTES"
  fi
  TORCH=cuda
  install "torch 2.13.0" --require-hashes -r "$LOCKS/torch.txt"
}

# The sources are used where they stand, so an edit or a git pull needs no installation.
link_package() {
  local packages # with -S too, Python would name the folder of the Python that it was made from
  packages="$("$VENV/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  printf '%s\n' "$TRAINING/src" >"$packages/lora_trainer.pth"
  printf '#!/bin/sh\nexec "%s" -m lora_trainer.cli "$@"\n' "$VENV/bin/python" >"$VENV/bin/lora-trainer"
  chmod +x "$VENV/bin/lora-trainer"
}

stop_installing() {
  [[ -z "${CHILD:-}" ]] || kill "$CHILD" 2>/dev/null || true
  printf '%s' "$CLEAR_LINE" >&2
  fail 143 "stopped while installing" "$VENV" "a signal came" \
    "start again: the installation is done over"
}

make_environment() {
  local why begun=$SECONDS
  TORCH="$(wanted_torch)"
  if [[ "$TORCH" == cpu ]]; then check_disk "$CPU_BYTES"; else check_disk "$CUDA_BYTES"; fi
  if [[ -e "$VENV" && ! -e "$VENV/stamp" ]]; then
    say "Found an unfinished $VENV; making it anew"
  fi
  say "${BOLD}Installing into $VENV (once, about a minute)$PLAIN"
  say "  $("$PYTHON" --version) from $PYTHON"
  rm -f -- "$VENV/stamp" "$VENV/stamp-test"
  why="$("$PYTHON" -m venv --clear "$VENV" 2>&1)" || refuse_place "$(tail -n 1 <<<"$why")"
  LOG="$VENV/install.log"
  : >"$LOG"
  install "the locked packages" --require-hashes -r "$LOCKS/cpu.txt"
  install_torch "$TORCH"
  install "the embedded base model" --require-hashes -r "$LOCKS/embedded.txt"
  link_package
  write_stamp "$VENV/stamp" "$(trainer_digest) $TORCH"
  say "  done in $((SECONDS - begun)) s"
}

# prepare_environment: returns with $VENV ready and its lock shared
prepare_environment() {
  case "${LORA_TORCH:-cpu}" in
    cpu | cuda) ;;
    *) fail 78 "LORA_TORCH is not understood" "environment LORA_TORCH=$LORA_TORCH" \
      "it may be cpu or cuda" "unset LORA_TORCH" ;;
  esac
  open_lock
  if [[ -x "$VENV/bin/python" ]]; then
    lock "$VENV/bin/python" 9 SH NB && is_ready && return
  fi
  find_python
  lock_alone
  if ! is_ready; then
    trap stop_installing INT TERM HUP
    make_environment
    trap - INT TERM HUP
  fi
  lock "$PYTHON" 9 SH
}

# prepare_test_environment: adds the tests' own packages, which replace none of the trainer's
prepare_test_environment() {
  local wanted stamp=''
  prepare_environment
  wanted="$(digest "$LOCKS/test.txt")"
  [[ -r "$VENV/stamp-test" ]] && read -r stamp <"$VENV/stamp-test"
  [[ "$stamp" != "$wanted" ]] || return 0
  exec 8>>"$VENV.test.lock"
  lock "$VENV/bin/python" 8 EX
  trap stop_installing INT TERM HUP
  LOG="$VENV/install-test.log"
  : >"$LOG"
  say "${BOLD}Adding the tests' packages$PLAIN"
  install "from requirements/test.txt" --require-hashes -r "$LOCKS/test.txt"
  write_stamp "$VENV/stamp-test" "$wanted"
  trap - INT TERM HUP
  exec 8>&-
}
