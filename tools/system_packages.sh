#!/bin/sh
# system_packages.sh PYTHON: what the test suite uses beyond Python packages. As root on a Debian machine missing ones are
# installed; elsewhere they are named, together with what goes without them.
#   chromium             opens the pages that `regard look` and `regard compare` write
#   g++, Python.h        torch.compile builds with them (compiled FlexAttention)
set -eu
python=$1
packages=""

found=""
for browser in chromium chromium-browser google-chrome google-chrome-stable chrome; do
    command -v $browser >/dev/null && found=$browser && break
done
[ -n "$found" ] || packages="$packages chromium"
command -v g++ >/dev/null || packages="$packages g++"
"$python" - <<'PY' || packages="$packages python3-dev"
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
PY
[ -n "$packages" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing with apt-get:$packages"
    if apt-get update -qq </dev/null &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages </dev/null >/dev/null; then
        exit 0
    fi
fi
echo "note: not installed:$packages. Tests that open a page need chromium, torch.compile needs g++ and python3-dev;" >&2
echo "      on Debian and Ubuntu: apt-get install$packages" >&2
