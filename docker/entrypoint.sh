#!/usr/bin/env bash
# Run a command in the mounted repository: one pipeline at a time, never as root. What a killed run left behind is
# cleared by finetune.doctor.repro, which sees this lock as its own.
set -euo pipefail

stop() {
  printf 'finetune: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 1
}

if [ "$(id -u)" = 0 ] && [ "${FINETUNE_ALLOW_ROOT:-}" != 1 ]; then
  # Root writes through the read-only files that DVC links into its cache, and would damage the cache unseen.
  stop "refusing to run as root" "docker run --user \"\$(id -u):\$(id -g)\" ..., or -e FINETUNE_ALLOW_ROOT=1"
fi
if [ ! -d .dvc ]; then
  # shellcheck disable=SC2016  # the remedy is to be typed as it stands
  stop "$PWD is not the repository" 'docker run -v "$PWD:$PWD" -w "$PWD" ...'
fi
if [ ! -w .dvc ]; then
  # Another UID would fail at its first out, an hour later.
  stop "$PWD cannot be written by UID $(id -u)" "docker run --user $(stat -c %u:%g .dvc) ..., its owner"
fi

umask 0002
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
# DVC's record of file hashes: without a place that outlives the container, every start hashes everything again.
export DVC_SITE_CACHE_DIR="${DVC_SITE_CACHE_DIR:-$PWD/.dvc/site}"
mkdir -p .dvc/tmp "$DVC_SITE_CACHE_DIR"

case "$*" in
  # These look at a run as well as beside one; what a shell starts by finetune.doctor.repro takes the lock itself.
  bash | bash\ * | sh | sh\ * | "python -m finetune.doctor" | "python -m finetune.doctor "*) exec "$@" ;;
esac
exec 9>.dvc/tmp/pipeline.flock
flock --nonblock 9 || stop "another container is running the pipeline here" "wait for it, or stop it with docker stop"
exec "$@"
