#!/usr/bin/env bash
# Renew the lock files of the three stacks, or check them: ./training/requirements/lock.sh --help
exec python3 "$(dirname "${BASH_SOURCE[0]}")/lock.py" "$@"
