#!/usr/bin/env bash
# Install lock files into /opt/venv during the image build; called by the Dockerfile: install.sh LOCK ...
#
# Wheels are kept in the builder's cache and installed from there, so that a build with
# unchanged locks needs no network. Bytecode is compiled here, because the root is read-only later,
# and every file gets the same time: the same locks give the same layer.
#
# Variables: LAYER_TIME, the time of every file; EXTRA, a lock of /locks that may hold sources
set -Eeuo pipefail

readonly KEPT=/var/cache/wheels WHEELS=/wheels SECRETS=/run/secrets
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu

pip() { /opt/venv/bin/python -m pip "$@"; }

# Every package is checked against the lock's sha256, except the cpu stack's torch, which is built
# per index (requirements/cpu-torch.txt).
install_lock() {
  local lock="$1" options=(--no-deps --progress-bar off -r "$1") sources=() offline
  if grep -q -e --hash= "$lock"; then
    options+=(--require-hashes)
  elif ! ls "$WHEELS"/torch-*.whl >/dev/null 2>&1; then
    sources+=(--extra-index-url "$TORCH_INDEX")
  fi
  offline=(install --no-compile --no-index --find-links "$KEPT" "${options[@]}")
  if pip "${offline[@]}" >/tmp/offline.log 2>&1; then
    printf '%s: installed from the cache\n' "$lock"
    return
  fi
  # Without a hash, a wheel that an interrupted build left half-written is not noticed.
  [[ " ${options[*]} " == *" --require-hashes "* ]] || rm -f -- "$KEPT"/torch-*.whl
  pip download --dest "$KEPT" ${sources[@]+"${sources[@]}"} "${options[@]}"
  pip "${offline[@]}"
}

install_main() {
  local lock
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS="$WHEELS"
  [[ ! -s "$SECRETS/ca_cert" ]] || export PIP_CERT="$SECRETS/ca_cert"
  [[ ! -s "$SECRETS/pip_conf" ]] || export PIP_CONFIG_FILE="$SECRETS/pip_conf"
  for lock; do install_lock "$lock"; done
  [[ -z "${EXTRA:-}" ]] ||
    pip install --no-deps --no-compile --progress-bar off --require-hashes -r "/locks/$EXTRA.txt"
  pip uninstall --yes pip >/dev/null
  # torch's own tests and templates are not Python that every version can read.
  /opt/venv/bin/python -m compileall -q -f -j 0 -x '/(tests?|testing|_inductor)/' \
    --invalidation-mode unchecked-hash /opt/venv/lib
  find /opt/venv -exec touch --no-dereference --date="@$LAYER_TIME" {} +
}

install_main "$@"
