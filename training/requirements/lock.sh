#!/usr/bin/env bash
# Update or check the lock files of the three stacks: ./training/requirements/lock.sh --help
exec python3 "$(dirname "${BASH_SOURCE[0]}")/lock.py" "$@"
