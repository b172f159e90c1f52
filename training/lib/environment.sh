#!/usr/bin/env bash
# The environment that run.sh, test.sh and .ci/run start: training/.venv, or LORA_VENV. It is
# sourced and only defines functions; lora_trainer/commands/install.py makes the environment, from
# the locks of one stack, and knows when it is ready.

TRAINING="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly TRAINING
readonly INSTALL='import sys
sys.path.insert(0, sys.argv.pop(1))
from lora_trainer.commands.install import main
sys.exit(main())'

# shellcheck source-path=SCRIPTDIR source=stack.sh
source "$TRAINING/lib/stack.sh"

# prepare_environment [--tests] [COMMAND...]: returns with $VENV ready and its lock shared, by a
# descriptor that survives exec. If it has to be made first, this process makes it and becomes COMMAND.
prepare_environment() {
  local owner install
  choose_stack
  install=(-I -c "$INSTALL" "$TRAINING/src" --venv "$VENV" --stack "$STACK" --caller "${0##*/}")
  [[ "${1:-}" != --tests ]] || { install+=(--tests) && shift; }
  { mkdir -p "$(dirname "$VENV")" && exec 9>>"$VENV.lock"; } 2>/dev/null || exec 9</dev/null
  if [[ -x "$VENV/bin/python" ]] && "$VENV/bin/python" "${install[@]}" --ready 9 2>/dev/null; then
    read -r _ _ owner <"$VENV/stamp"
    [[ "$owner" != "$TRAINING" ]] || return 0
    say "The environment $VENV belongs to $owner; its packages are used with the sources of $TRAINING"
    export PYTHONPATH="$TRAINING/src${PYTHONPATH:+:$PYTHONPATH}"
    return
  fi
  find_python
  exec "$PYTHON" "${install[@]}" --python "$PYTHON" -- "$@"
}
