#!/bin/sh
# make_venv.sh PYTHON DIR: a virtual environment with pip in DIR. Debian splits venv and pip off its python3, so this takes
# whichever way the machine offers, and names the package to install where it offers none.
set -eu
python=$1
dir=$2

command -v "$python" >/dev/null || {
    echo "error: no '$python' here; install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)," >&2
    echo "       or name one: make PYTHON=/path/to/python3" >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: '$python' is $("$python" --version 2>&1), need Python 3.11 or newer; name another: make PYTHON=python3.12" >&2
    exit 1
}

# A virtual environment that works already is kept: what is installed in it is not fetched twice.
if [ -x "$dir/bin/python" ] && "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
rm -rf "$dir"

works() { [ -x "$dir/bin/python" ] && "$dir/bin/python" -m pip --version >/dev/null 2>&1; }

"$python" -m venv "$dir" >/dev/null 2>&1 || true
works && exit 0
rm -rf "$dir"

if "$python" -m virtualenv --version >/dev/null 2>&1; then
    "$python" -m virtualenv -q "$dir" || true
    works && exit 0
    rm -rf "$dir"
fi

# Debian's python3-pip without python3-venv: pip can install itself into an environment made without it.
if "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip "$dir" >/dev/null 2>&1; then
    "$python" -m pip --python "$dir/bin/python" install -q pip || true
    works && exit 0
    rm -rf "$dir"
fi

package=python3-venv
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $package with apt-get, since this python3 cannot make virtual environments" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $package; } >&2 </dev/null || true
    "$python" -m venv "$dir" >/dev/null 2>&1 || true
    works && exit 0
    rm -rf "$dir"
fi

echo "error: '$python' cannot make a virtual environment: its venv module or pip is not installed." >&2
echo "       On Debian and Ubuntu: apt-get install $package   (then run make again)" >&2
exit 1
