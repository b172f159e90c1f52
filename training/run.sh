#!/usr/bin/env bash
# Fine-tune a model: ./training/run.sh
#
# Makes training/.venv on the first start (a second start installs nothing and needs no
# network), then trains as the config file says. It resumes by itself where it was stopped.
#
# Usage: run.sh [--config FILE] [--check] [--resume [never]] [--cpu | --gpus LIST] [--KEY VALUE ...]
#
#   --config FILE   what to train (default: training/config.json)
#   --check         check config, data, model, disk and permissions; train nothing
#   --resume        go on from the newest sound checkpoint, as is the default; never: start anew
#   --cpu           leave the GPUs alone
#   --gpus LIST     all (default), none, or numbers as nvidia-smi shows them: 0 or 0,1
#   --local         run on this machine itself (default)
#   --docker        run in a container: not in this version
#   --help          this text
#   --KEY VALUE     any key of the config, e.g. --learning_rate 1e-4, and any flag of the trainer
#   --              everything after it goes to the trainer
#
# Variables:
#   LORA_TRAINER_CONFIG   the config file where --config is not given
#   LORA_TRAINER_<KEY>    a key of the config, e.g. LORA_TRAINER_LEARNING_RATE
#   LORA_STACK            the packages: cpu, current (GPU, driver 580+) or cu121 (GPU, driver 525+);
#                         default: what the GPU and its driver can use, else cpu
#   LORA_PYTHON           the Python that makes the environment (default: the first of 3.11+, then
#                         3.10; for the stack cu121 the first 3.10, then 3.11)
#   LORA_VENV             where the environment is (default: training/.venv; training/.venv-cu121)
#   HF_TOKEN, HF_TOKEN_FILE, HF_HOME, NO_COLOR, CUDA_VISIBLE_DEVICES: as everywhere; pip's own
#   settings (PIP_*, pip.conf) decide where packages come from
#
# Exit codes: 0 finished, 65 data, 69 unavailable (Python, packages, model, device), 70 internal
# fault, 74 disk, 75 another run holds this output, 77 no permission, 78 config, 137 memory,
# 143 stopped by a signal
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# need_value FLAG VALUE...: the value of a flag must follow it
need_value() {
  (($# > 1)) || fail 78 "$1 lacks its value" "command line" "nothing follows it" "run.sh --help"
}

read_arguments() {
  COMMAND=train
  CONFIG="${LORA_TRAINER_CONFIG:-$TRAINING/config.json}"
  PASSED=()
  while (($#)); do
    case "$1" in
      --config=* | --gpus=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
      --config)
        need_value "$@"
        CONFIG="$2"
        shift
        ;;
      --gpus)
        need_value "$@"
        select_gpus "$2"
        shift
        ;;
      --cpu) select_gpus none ;;
      --check) COMMAND=check ;;
      --resume)
        PASSED+=(--resume)
        if [[ "${2:-}" == auto || "${2:-}" == never ]]; then
          PASSED+=("$2")
          shift
        else
          PASSED+=(auto)
        fi
        ;;
      --local) ;;
      --docker)
        fail 78 "there is no container in this version" "--docker" \
          "training runs on the machine itself" "./training/run.sh --local"
        ;;
      --help | -h)
        print_header "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --)
        shift
        PASSED+=("$@")
        return
        ;;
      *) PASSED+=("$1") ;;
    esac
    shift
  done
}

select_gpus() {
  case "$1" in
    all) ;;
    none)
      export CUDA_VISIBLE_DEVICES=""
      export LORA_STACK="${LORA_STACK:-cpu}"
      ;;
    *)
      [[ "$1" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail 78 "--gpus is not understood" "--gpus $1" \
        "it takes all, none, or numbers with commas between them" "run.sh --gpus 0,1"
      export CUDA_VISIBLE_DEVICES="$1"
      ;;
  esac
}

run_main() {
  read_arguments "$@"
  [[ -r "$CONFIG" && ! -d "$CONFIG" ]] || fail 78 "the config file cannot be read" "$CONFIG" \
    "$([[ -e "$CONFIG" ]] && echo "it is a folder or not readable" || echo "there is no such file")" \
    "run.sh --config FILE"
  prepare_environment
  exec "$VENV/bin/python" -m lora_trainer.cli "$COMMAND" --config "$CONFIG" \
    ${PASSED[@]+"${PASSED[@]}"}
}

run_main "$@"
