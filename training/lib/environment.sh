#!/usr/bin/env bash
# Makes training/.venv from the locks of one stack (requirements/lock.sh tells which there are).
# Sourced by run.sh, test.sh and .ci/run, which set the shell's options; it only defines
# functions, of which they call prepare_environment or prepare_test_environment.
#
# The environment is ready when its stamp names the stack's locks, the Python and the place
# that it was made from, and the checkout whose sources it runs. The stamp goes first and comes
# last, so an interrupted installation is seen and done over. Whoever installs holds
# $VENV.lock alone; whoever runs shares it until the process ends (the descriptor survives
# exec), so no run loses the packages under it.

TRAINING="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly TRAINING
readonly LOCKS="$TRAINING/requirements"
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly CPU_BYTES=$((3 * 1000 ** 3)) CUDA_BYTES=$((10 * 1000 ** 3))

# shellcheck source-path=SCRIPTDIR source=stack.sh
source "$TRAINING/lib/stack.sh"

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
total = hashlib.sha256(repr((sys.version, sys.argv[1])).encode())
for name in sys.argv[2:]:
    with open(name, "rb") as file:
        total.update(hashlib.sha256(file.read()).digest())
print(total.hexdigest())' "$VENV" "$@" 2>/dev/null
}

# stack_digest STACK: current and cpu have all but torch in common
stack_digest() {
  local rest="$1"
  [[ "$rest" != current ]] || rest=cpu
  digest "$LOCKS/$rest.txt" "$LOCKS/$1-torch.txt" "$LOCKS/embedded.txt"
}

# has_packages: they are the stack's, whichever checkout's sources they run. Sets MADE, the stack
# they were made for, and PLACE, that checkout. The CUDA build serves a CPU too; a CPU build is
# replaced once a GPU is there.
has_packages() {
  local stamp=''
  MADE='' PLACE=''
  [[ -r "$VENV/stamp" ]] && read -r stamp MADE PLACE <"$VENV/stamp" || return 1
  [[ "$MADE" == "$STACK" || "$MADE $STACK" == "current cpu" ]] || return 1
  [[ "$stamp" == "$(stack_digest "$MADE")" ]]
}

is_ready() { has_packages && [[ "$PLACE" == "$TRAINING" ]]; }

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
      fail 75 "the environment must be rebuilt, but a run is using it" "$VENV" \
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
  local lock="$LOCKS/$STACK-torch.txt" version
  version="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$lock")"
  if [[ "$STACK" == cpu ]]; then
    say "  torch $version for the CPU"
    try_pip -r "$lock" && return
    tail -n "+$((LOG_START + 1))" "$LOG" | grep -q "No matching distribution" || explain_pip torch
    try_pip --extra-index-url "$TORCH_CPU_INDEX" -r "$lock" && return
    say "  torch's CPU build is not reachable; using the registry's build with CUDA: 3 GB to download"
    check_disk "$CUDA_BYTES"
    STACK=current lock="$LOCKS/current-torch.txt"
  fi
  install "torch $version with CUDA" --require-hashes -r "$lock"
}

# The sources are used where they stand, so an edit or a git pull needs no installation.
link_package() {
  local packages # with -S too, Python would name the folder of the Python that it was made from
  packages="$("$VENV/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  printf '%s\n' "$TRAINING/src" >"$packages/lora_trainer.pth"
  printf '#!/bin/sh\nexec "%s" -m lora_trainer "$@"\n' "$VENV/bin/python" >"$VENV/bin/lora-trainer"
  chmod +x "$VENV/bin/lora-trainer"
}

stop_installing() {
  [[ -z "${CHILD:-}" ]] || kill "$CHILD" 2>/dev/null || true
  printf '%s' "$CLEAR_LINE" >&2
  fail 143 "stopped while installing" "$VENV" "a signal came" \
    "start again; the installation is repeated"
}

# The packages serve any checkout; which one's sources they run is a matter of one line.
make_environment() {
  local why begun=$SECONDS
  if has_packages; then
    STACK="$MADE"
  else
    if [[ "$STACK" == cpu ]]; then check_disk "$CPU_BYTES"; else check_disk "$CUDA_BYTES"; fi
    if [[ -e "$VENV" && ! -e "$VENV/stamp" ]]; then
      say "Found an unfinished $VENV; installing it again"
    fi
    say "${BOLD}Installing the stack $STACK into $VENV (once; takes some minutes)$PLAIN"
    say "  $("$PYTHON" --version) from $PYTHON"
    rm -f -- "$VENV/stamp" "$VENV/stamp-test"
    why="$("$PYTHON" -m venv --clear "$VENV" 2>&1)" || refuse_place "$(tail -n 1 <<<"$why")"
    LOG="$VENV/install.log"
    : >"$LOG"
    install "the locked packages" --require-hashes -r "$LOCKS/$STACK.txt"
    install_torch
    install "the embedded base model and charts" --require-hashes -r "$LOCKS/embedded.txt"
    say "  done in $((SECONDS - begun)) s"
  fi
  rm -f -- "$VENV/stamp"
  link_package
  write_stamp "$VENV/stamp" "$(stack_digest "$STACK") $STACK $TRAINING"
}

# prepare_environment: returns with $VENV ready and its lock shared
prepare_environment() {
  choose_stack
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
  local lock wanted stamp='' locks=("$LOCKS/cpu-test.txt" "$LOCKS/deepspeed.txt")
  prepare_environment
  [[ "$STACK" != cu121 ]] || locks=("$LOCKS/cu121-test.txt")
  wanted="$(digest "${locks[@]}")"
  [[ -r "$VENV/stamp-test" ]] && read -r stamp <"$VENV/stamp-test"
  [[ "$stamp" != "$wanted" ]] || return 0
  exec 8>>"$VENV.test.lock"
  lock "$VENV/bin/python" 8 EX
  trap stop_installing INT TERM HUP
  LOG="$VENV/install-test.log"
  : >"$LOG"
  say "${BOLD}Adding the tests' packages$PLAIN"
  for lock in "${locks[@]}"; do
    install "from requirements/${lock##*/}" --require-hashes -r "$lock"
  done
  write_stamp "$VENV/stamp-test" "$wanted"
  trap - INT TERM HUP
  exec 8>&-
}
