#!/usr/bin/env bash
# A Docker engine of CI's own, for the tests marked `docker`. Sourced by .ci/run, which calls
# start_engine and, whatever happens, stop_engine.
#
# Engine, client, Compose v2 and buildx are Debian 13's packages, unpacked into a folder of their
# own: nothing of the machine is replaced and no service is started. They run on Debian 12 too,
# but for runc, which is taken from the machine's own release. The mirror is the one in the
# machine's own apt sources. No image registry is needed: the base image is made by debootstrap,
# of the machine's release, so that wheels which fit its Python fit the image's.
#
# Started by hand for one's own tests:
#   source .ci/engine.sh && start_engine && export DOCKER_HOST PATH LORA_TEST_BASE_IMAGE
#
# Variables:
#   LORA_CI_ENGINE   folder of packages, layers, socket and pid (default: /var/tmp/lora-trainer-ci)

ENGINE="${LORA_CI_ENGINE:-/var/tmp/lora-trainer-ci}"
readonly ENGINE
readonly ENGINE_SUITE=trixie
readonly ENGINE_PACKAGES=(docker.io docker-cli docker-compose docker-buildx containerd)
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

engine_say() { printf '%s\n' "$*" >&2; }

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install --yes \
    --no-install-recommends "$@" >"$ENGINE/apt.log" 2>&1 || {
    tail -n 5 "$ENGINE/apt.log" >&2
    return 1
  }
}

# Prints where the machine itself takes Debian's packages from.
debian_mirror() {
  # shellcheck disable=SC2016 # apt's own variables
  apt-get indextargets --format '$(CODENAME) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
    awk '$2 == "Debian" && $1 !~ /-/ { print $3; exit }'
}

# Unpacks what the engine consists of, once.
unpack_engine() {
  local apt="$ENGINE/apt" mirror package
  [[ ! -e "$ENGINE/unpacked" ]] || return 0
  rm -rf -- "$apt" "$ENGINE/tree"
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/packages" "$ENGINE/tree"
  mirror="$(debian_mirror)"
  [[ -n "$mirror" ]] || {
    engine_say "no source of Debian's packages was found: apt-get indextargets"
    return 1
  }
  printf 'deb [signed-by=%s] %s %s main\n' "$KEYRING" "$mirror" "$ENGINE_SUITE" >"$apt/sources.list"
  local options=(-q -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
  (
    cd "$apt/packages"
    apt-get "${options[@]}" update
    apt-get "${options[@]}" download "${ENGINE_PACKAGES[@]}"
    apt-get -q -o APT::Sandbox::User=root download runc
  ) >"$ENGINE/unpack.log" 2>&1 || {
    tail -n 5 "$ENGINE/unpack.log" >&2
    return 1
  }
  for package in "$apt/packages"/*.deb; do
    dpkg-deb --extract "$package" "$ENGINE/tree"
  done
  rm -rf -- "$apt"
  : >"$ENGINE/unpacked"
}

# Makes the image that the cpu stack is built on, once.
make_base_image() {
  local suite mirror
  # shellcheck source=/dev/null
  suite="$(source /etc/os-release && printf '%s' "$VERSION_CODENAME")"
  LORA_TEST_BASE_IMAGE="local/debian:$suite"
  ! docker image inspect "$LORA_TEST_BASE_IMAGE" >/dev/null 2>&1 || return 0
  mirror="$(debian_mirror)"
  rm -rf -- "$ENGINE/base"
  debootstrap --variant=minbase "$suite" "$ENGINE/base" "$mirror" >"$ENGINE/debootstrap.log" 2>&1 || {
    tail -n 5 "$ENGINE/debootstrap.log" >&2
    return 1
  }
  rm -rf -- "$ENGINE/base/var/cache/apt/archives" "$ENGINE/base/var/lib/apt/lists"
  mkdir -p "$ENGINE/base/var/cache/apt/archives/partial" "$ENGINE/base/var/lib/apt/lists/partial"
  tar --create --numeric-owner --one-file-system --directory "$ENGINE/base" . |
    docker import --change 'CMD ["bash"]' - "$LORA_TEST_BASE_IMAGE" >/dev/null
  rm -rf -- "$ENGINE/base"
}

# start_engine: sets DOCKER_HOST, PATH and LORA_TEST_BASE_IMAGE, and returns once it answers
start_engine() {
  local wait pid
  mkdir -p "$ENGINE/config"
  PATH="$ENGINE/tree/usr/bin:$ENGINE/tree/usr/sbin:$PATH"
  DOCKER_HOST="unix://$ENGINE/docker.sock"
  # The client finds Compose and buildx where its configuration says.
  DOCKER_CONFIG="$ENGINE/config"
  export PATH DOCKER_HOST DOCKER_CONFIG LORA_TEST_BASE_IMAGE
  printf '{"cliPluginsExtraDirs": ["%s"]}\n' "$ENGINE/tree/usr/libexec/docker/cli-plugins" \
    >"$ENGINE/config/config.json"
  if ! command -v debootstrap >/dev/null || ! command -v iptables >/dev/null; then
    apt-get -q update >/dev/null
    apt_install debootstrap iptables
  fi
  unpack_engine
  if pid="$(engine_pid)"; then
    engine_say "the engine of an earlier start is there already (process $pid)"
  else
    rm -f -- "$ENGINE/docker.pid" "$ENGINE/docker.sock"
    dockerd --data-root "$ENGINE/data" --exec-root "$ENGINE/exec" --pidfile "$ENGINE/docker.pid" \
      --host "$DOCKER_HOST" --storage-driver overlay2 >"$ENGINE/dockerd.log" 2>&1 9>&- &
  fi
  for ((wait = 0; wait < 300; wait++)); do
    ! docker version >/dev/null 2>&1 || break
    sleep 0.2
  done
  docker version >/dev/null 2>&1 || {
    tail -n 20 "$ENGINE/dockerd.log" >&2
    return 1
  }
  make_base_image
  engine_say "Docker engine $(docker version --format '{{.Server.Version}}')," \
    "Compose $(docker compose version --short), base image $LORA_TEST_BASE_IMAGE"
}

# Prints the process id of the engine that this folder's pid file names, if it runs.
engine_pid() {
  local pid=''
  [[ -r "$ENGINE/docker.pid" ]] && read -r pid <"$ENGINE/docker.pid" || [[ -n "$pid" ]] || return 1
  [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == dockerd ]] || return 1
  printf '%s\n' "$pid"
}

# stop_engine: ends it and its containers; packages and layers stay for the next start
stop_engine() {
  local pid wait containers
  pid="$(engine_pid)" || return 0
  mapfile -t containers < <(docker ps --quiet 2>/dev/null)
  ((${#containers[@]} == 0)) || docker kill "${containers[@]}" >/dev/null 2>&1 || true
  kill "$pid"
  for ((wait = 0; wait < 150; wait++)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.2
  done
  kill -9 "$pid" 2>/dev/null || true
}
