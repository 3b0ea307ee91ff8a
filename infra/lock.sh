#!/usr/bin/env bash
# Resolves requirements.lock from pyproject.toml, dev tools included, with the package sources configured for pip.
#
# uv, in a temporary environment, resolves for all platforms and Python versions at once. Its torch lines become one
# without a local version: pip takes the CPU build if one is offered; torch's own requirements add CUDA where needed.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

python3 -m venv "$tools"
"$tools/bin/pip" install --disable-pip-version-check --quiet uv
sources=()
for link in $("$tools/bin/pip" config get global.find-links 2>/dev/null || true); do sources+=(--find-links "$link"); done
for index in $("$tools/bin/pip" config get global.extra-index-url 2>/dev/null || true); do sources+=(--extra-index-url "$index"); done

"$tools/bin/uv" pip compile pyproject.toml --extra dev --universal --python-version 3.11 --quiet \
    ${sources[@]+"${sources[@]}"} --index-strategy unsafe-best-match \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file "$tools/lock"
{
    echo "# Made by make lock from pyproject.toml: every supported Python and platform, the tools of make test included."
    sed -E '/^(nvidia-|cuda-)/d; s/^(torch==[0-9.]+).*/\1/' "$tools/lock" | uniq
} >"$tools/requirements.lock"
cp "$tools/requirements.lock" requirements.lock
