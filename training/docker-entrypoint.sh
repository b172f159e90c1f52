#!/usr/bin/env bash
# What the container starts: hands over the secrets, then becomes the trainer's supervisor, which
# checks first what Docker gave it (lora_trainer/commands/container.py).
#
# Usage: docker-entrypoint.sh [train | preflight | healthcheck | --KEY VALUE ... | COMMAND ...]
#
#   train         (default) check, then train with /workspace/config.json; options follow it
#   preflight     check mounts, config, data, model and disk; train nothing
#   healthcheck [--alive]   ask /health; exit 0 if the run is well (what HEALTHCHECK calls), with
#                 --alive if anything answers
#   --KEY VALUE   options alone are train's
#   check, schema, keys, ...   any other command of lora-trainer
#   COMMAND       anything else is executed as it stands, e.g. bash or python3
#
# Variables:
#   LORA_TRAINER_CONFIG   the config file (default: /workspace/config.json)
#   LORA_REQUIRE_GPU      1: exit 69 where no GPU is visible, instead of training on the CPU
#   LORA_GPU_RESERVED     1: preflight checks that this host can give the trainer a GPU
#   LORA_HOST_<MOUNT>, LORA_HOST_CONFIG, LORA_HOST_PORT   what the mounts (OUTPUTS, DATASETS, MODELS,
#                         LOGS), the config file and the port are called on the host
#   HF_TOKEN_FILE, WANDB_API_KEY_FILE, LORA_TRAINER_HEALTH_TOKEN_FILE, AWS_SHARED_CREDENTIALS_FILE,
#   GOOGLE_APPLICATION_CREDENTIALS: files with secrets; one that is empty counts as not given
#   LORA_TRAINER_<KEY>    a key of the config
#
# Exit codes: the trainer's; from here 69 no usable GPU, 74 a full disk, 77 a mount that may not be
# written, 78 config
set -Eeuo pipefail

# Secrets that Compose mounts from nowhere are empty files.
drop_empty_secrets() {
  local name
  for name in HF_TOKEN_FILE WANDB_API_KEY_FILE LORA_TRAINER_HEALTH_TOKEN_FILE AWS_SHARED_CREDENTIALS_FILE \
    GOOGLE_APPLICATION_CREDENTIALS; do
    [[ -n "${!name:-}" && -e "${!name}" && ! -s "${!name}" ]] && unset "$name"
  done
  for name in HF_TOKEN WANDB_API_KEY; do
    [[ -n "${!name:-}" ]] || unset "$name"
  done
  # wandb itself knows no file.
  if [[ -z "${WANDB_API_KEY:-}" && -n "${WANDB_API_KEY_FILE:-}" ]]; then
    WANDB_API_KEY="$(<"$WANDB_API_KEY_FILE")"
    export WANDB_API_KEY
  fi
}

entrypoint_main() {
  [[ "${1:-}" != -* ]] || set -- train "$@"
  drop_empty_secrets
  case "${1:-train}" in
    train | check) LORA_CONTAINER=train exec lora-trainer "${@:-train}" ;;
    preflight) LORA_CONTAINER=preflight exec lora-trainer check --quick "${@:2}" ;;
    healthcheck) exec python3 -I -S "${LORA_SOURCE:-/opt/trainer/src}/lora_trainer/serve/probe.py" "${@:2}" ;;
    chat | evaluate | merge | export | fetch | push | runs | compare | rm | dashboard | health | clean | schema | keys)
      exec lora-trainer "$@"
      ;;
    *) exec "$@" ;;
  esac
}

entrypoint_main "$@"
