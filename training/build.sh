#!/usr/bin/env bash
# Build the trainer's image: ./training/build.sh
#
# Picks the stack that this machine's GPU and driver support, checks the requirements, builds the
# image, and reports its size.
#
# Usage: build.sh [--stack NAME] [--extra NAME] [--base-image NAME] [--tag NAME] [--ca-cert FILE]
#                 [--pip-conf FILE] [--apt-sources FILE] [--wheels FOLDER] [--network NAME]
#                 [--no-cache] [--push]
#
#   --stack NAME        cu121 (driver 525+, capability 7.0 to 9.0), current (driver 580+, capability
#                       7.5+) or cpu; default: what the GPU and its driver support, else cpu
#   --extra NAME        s3fs: for s3:// addresses; deepspeed: for parallelism: deepspeed, on the stacks
#                       current and cpu
#   --base-image NAME   another Debian or Ubuntu base; pin it with name@sha256:... The default for
#                       cu121 contains CUDA and cuDNN, which torch includes too: with
#                       --base-image ubuntu:22.04 the image is smaller
#   --tag NAME          the image's name (default: lora-trainer:STACK)
#   --ca-cert FILE      certificates to trust while building, as PEM
#   --pip-conf FILE     pip's settings for the build, e.g. a private index
#   --apt-sources FILE  a sources.list to use while building
#   --wheels FOLDER     an additional folder of wheels for pip
#   --network NAME      the build's network, e.g. host
#   --no-cache          repeat every step
#   --push              push the image to the registry that its tag names
#   --help              this text
#
# These files are build secrets: they are in no layer of the image and not in its history.
#
# Variables: LORA_STACK, LORA_IMAGE and BASE_IMAGE, as the flags; see .env.training
# Exit codes: 0 built, 69 no engine, buildx or Compose, or the build failed, 74 too little disk
# space, 77 no permission to use the engine, 78 wrong usage or a missing file
set -Eeuo pipefail

TRAINING="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly TRAINING
# shellcheck source-path=SCRIPTDIR source=lib/stack.sh
source "$TRAINING/lib/stack.sh"
# shellcheck source-path=SCRIPTDIR source=lib/container.sh
source "$TRAINING/lib/container.sh"

# Layers, and the build's cache beside them, in GB.
readonly CUDA_GB=25 CPU_GB=6

base_of() {
  case "$1" in
    cu121) echo nvidia/cuda:12.1.0-cudnn8-runtime-ubuntu22.04 ;;
    current) echo nvidia/cuda:13.0.2-base-ubuntu24.04 ;;
    cpu) echo debian:13-slim ;;
  esac
}

# need_file FLAG FILE: it is readable; sets FOUND to its full path
need_file() {
  [[ -r "$2" ]] || fail 78 "the path given to $1 cannot be read" "$1 $2" \
    "$([[ -e "$2" ]] && echo "no permission" || echo "there is no such file or folder")" "build.sh --help"
  [[ "$1" != --wheels || -d "$2" ]] || fail 78 "--wheels takes a folder" "--wheels $2" "it is a file" "build.sh --help"
  FOUND="$(cd "$(dirname "$2")" && pwd)/${2##*/}"
}

read_arguments() {
  local id
  BASE='' TAG='' EXTRA='' IS_PUSHED=0 OPTIONS=()
  while (($#)); do
    [[ "$1" != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case "$1" in
      --help | -h) print_header "${BASH_SOURCE[0]}" && exit ;;
      --no-cache) OPTIONS+=(--no-cache) && shift && continue ;;
      --push) IS_PUSHED=1 && shift && continue ;;
      --stack | --extra | --base-image | --tag | --network) need_value "$@" ;;
      --ca-cert | --pip-conf | --apt-sources | --wheels) need_value "$@" && need_file "$@" ;;
      *) fail 78 "unknown argument" "command line: $1" "build.sh has no such flag" "build.sh --help" ;;
    esac
    case "$1" in
      --stack) export LORA_STACK="$2" ;;
      --extra) EXTRA="$2" ;;
      --base-image) BASE="$2" ;;
      --tag) TAG="$2" ;;
      --network) OPTIONS+=(--network "$2") ;;
      --wheels) OPTIONS+=(--build-context "wheels=$FOUND") ;;
      *) id="${1#--}" && OPTIONS+=(--secret "id=${id//-/_},src=$FOUND") ;;
    esac
    shift 2
  done
}

check_builder() {
  local version
  version="$(docker buildx version 2>/dev/null | awk '{ print $2 }')"
  [[ -n "$version" ]] || fail 69 "Docker's buildx is missing" "docker buildx version" \
    "the client does not know the command" "install the package docker-buildx-plugin (Debian 13: docker-buildx)"
  ! is_older "$version" "$LEAST_BUILDX" || fail 69 "Docker's buildx is too old" "docker buildx version" \
    "it is $version, needed is $LEAST_BUILDX" "update the package docker-buildx-plugin"
}

check_extra() {
  [[ -z "$EXTRA" || "$EXTRA" == deepspeed || "$EXTRA" == s3fs ]] ||
    fail 78 "unknown extra" "--extra $EXTRA" "the extras are s3fs and deepspeed" "build.sh --help"
  [[ "$EXTRA $STACK" != "deepspeed cu121" ]] || fail 78 "the stack cu121 has no DeepSpeed" "--extra deepspeed" \
    "it is not tested with torch 2.1.2" "leave --extra out: parallelism: fsdp shares the base model out there"
}

# The engine's disk is looked at where it is this machine's.
check_room() {
  local root free needed=$CUDA_GB
  [[ "$STACK" != cpu ]] || needed=$CPU_GB
  root="$(docker info --format '{{.DockerRootDir}}')"
  [[ -d "$root" ]] || return 0
  free="$(df -Pk "$root" | awk 'NR == 2 { print $4 }')"
  [[ "$free" =~ ^[0-9]+$ ]] && ((free * 1024 < needed * 1000 ** 3)) || return 0
  fail 74 "too little disk space for the image" "$root" \
    "$((free * 1024 / 1000 ** 3)) GB are free, $needed GB are needed" \
    "docker system prune, docker builder prune, or give the engine another data-root"
}

# BuildKit asks the registry about a base image that the engine does not have, at every build: with
# it, a rebuild needs no network.
keep_base() {
  docker image inspect "$BASE" >/dev/null 2>&1 || docker pull "$BASE" >&2 ||
    say "The base image $BASE cannot be pulled; the build will try again"
}

build_image() {
  local begun=$SECONDS revision
  revision="$(git -C "$TRAINING" rev-parse --short HEAD 2>/dev/null || echo unknown)"
  say "${BOLD}Building $TAG: stack $STACK on $BASE$PLAIN"
  # An engine before 23 does not know named contexts of itself; it fetches what does.
  if [[ " ${OPTIONS[*]-} " == *" --build-context "* ]] &&
    is_older "$(docker version --format '{{.Server.Version}}')" 23.0; then
    OPTIONS+=(--build-arg BUILDKIT_SYNTAX=docker/dockerfile:1)
  fi
  docker buildx build --load --tag "$TAG" --build-arg "STACK=$STACK" --build-arg "BASE_IMAGE=$BASE" \
    --build-arg "EXTRA=$EXTRA" --build-arg "REVISION=$revision" ${OPTIONS[@]+"${OPTIONS[@]}"} "$TRAINING" ||
    fail 69 "the image could not be built" "$TRAINING/Dockerfile" "the step that failed is above" \
      "behind a proxy: --ca-cert FILE, --pip-conf FILE; without a registry: --base-image NAME; disk: docker builder prune"
  say "${BOLD}Built $TAG$PLAIN in $((SECONDS - begun)) s," \
    "$(docker image inspect --format '{{.Size}}' "$TAG" | awk '{ printf "%.2f GB", $1 / 1e9 }')"
}

build_main() {
  read_arguments "$@"
  require_docker
  check_builder
  STACK="$(container_stack)"
  BASE="${BASE:-$(setting BASE_IMAGE "$(base_of "$STACK")")}"
  TAG="${TAG:-$(setting LORA_IMAGE "lora-trainer:$STACK")}"
  check_extra
  check_room
  keep_base
  build_image
  if ((IS_PUSHED)); then
    docker push "$TAG" || fail 69 "the image could not be pushed" "$TAG" "see above" \
      "docker login, and a tag that names your registry: --tag registry.example/lora-trainer:$STACK"
  fi
  say "  ./training/run.sh"
}

build_main "$@"
