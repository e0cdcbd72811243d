#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Makes the host ready: names (as root: installs) missing programs, then
# makes build/venv with the packages of requirements.txt.  Does nothing,
# quickly, if all is there.

set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$here/../build/venv
python=${PYTHON:-python3}

# Each program, and the Debian package that has it
programs='
python3:python3
apt-get:apt
dpkg-deb:dpkg
git:git
make:make
perl:perl
tar:tar
unshare:util-linux
xz:xz-utils
qemu-img:qemu-utils
qemu-system-x86_64:qemu-system-x86
qemu-system-aarch64:qemu-system-arm
'
# Firmware that guests boot with, likewise
folders='
/usr/share/OVMF:ovmf
/usr/share/AAVMF:qemu-efi-aarch64
'

missing_packages() {
    # An emulator in a folder of one's own is as good
    PATH=$PATH:${QEMU_BIN:-}
    for entry in $programs; do
        command -v "${entry%%:*}" > /dev/null || echo "${entry##*:}"
    done
    for entry in $folders; do
        [ -d "${entry%%:*}" ] || echo "${entry##*:}"
    done
    if [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ] &&
       [ ! -e /usr/share/keyrings/debian-archive-keyring.pgp ]; then
        echo debian-archive-keyring
    fi
    if [ ! -x "$venv/bin/python" ] &&
       ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        echo python3-venv
    fi
}

install_packages() {
    command="apt-get install --yes --no-install-recommends $1"
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        echo "setup: this host lacks packages; run as root:" >&2
        echo "  $command" >&2
        exit 4
    fi
    echo "setup: installing$1"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet
    $command
}

make_venv() {
    echo "setup: making build/venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet \
        --disable-pip-version-check --no-warn-script-location \
        --requirement "$here/requirements.txt"
    printf '%s\n' "$wanted" > "$venv/made-for"
}

# The virtual environment is whole if it was finished for these files and
# its Python still runs and finds what was installed last
venv_whole() {
    [ "$(cat "$venv/made-for" 2> /dev/null)" = "$wanted" ] &&
        "$venv/bin/python" -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, (
    "mesonbuild", "ninja", "pycotap", "qemu.qmp", "yaml",
    "pytest", "xdist", "flake8", "mypy", "pylint"))))' 2> /dev/null
}

packages=$(missing_packages | sort -u | sed 's/^/ /' | tr -d '\n')
[ -z "$packages" ] || install_packages "$packages"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
    echo "setup: expected Python 3.9 or newer, found" \
        "$("$python" --version)" >&2
    echo "  next: name a newer one with PYTHON=<path>" >&2
    exit 4
fi

# A moved checkout makes scripts of the environment point nowhere
wanted=$(echo "$here"; cat "$here/requirements.txt" "$here/setup.sh" |
    cksum)
venv_whole || make_venv
