#!/usr/bin/env bash
# Creates .venv with the locked packages and this one. Run by make; does nothing if .venv is complete.
#
# .venv/.complete is written last and records what was installed and where. If it is missing (an interrupted install) or
# .venv's Python no longer works, .venv is rebuilt; if its content differs, .venv is updated.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
wanted="$(cat requirements.lock pyproject.toml | cksum) in $PWD"
found="$(cat .venv/.complete 2>/dev/null || true)"

works() { (cd / && "$OLDPWD/$python" -c 'import memgpt, pip') 2>/dev/null; }
works_here() { [ "${found##* in }" = "$PWD" ] && works; }

if [ "$found" = "$wanted" ] && works; then exit 0; fi

if ! works_here; then
    base=
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            base=$name
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "error: no Python 3.11 to 3.14 with its venv module on the PATH; install one (Debian: python3 and python3-venv)" >&2
        exit 1
    fi
    echo "making .venv with $("$base" --version)"
    rm -rf .venv
    "$base" -m venv .venv
fi

rm -f .venv/.complete
export PIP_DISABLE_PIP_VERSION_CHECK=1
total=$(grep -c == requirements.lock)
echo "installing about $total packages into .venv (minutes the first time)"
log=.venv/install.log
trap 'if [ $? != 0 ] && [ -f $log ]; then tail -n 15 $log >&2; echo "error: the installation failed; run make again to retry" >&2; fi' EXIT
"$python" -m pip install --progress-bar off -r requirements.lock 2>$log | awk -v total="$total" '
    /^Collecting|^Requirement already/ && ++n % 60 == 0 && n < total { print "  " n " of about " total " found"; fflush() }
    /^Installing collected/ { print "  all found; installing"; fflush() }'
"$python" -m pip install --quiet --no-deps --no-build-isolation --editable . 2>>$log
"$python" -m pip check >>$log
echo "$wanted" >.venv/.complete
