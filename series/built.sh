#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The series in a QEMU that was built: series/built.sh QEMU_SRC
#
# Applies the series to a copy of the QEMU source tree, builds two targets
# with little that tests of guests don't need, and lets QEMU's own makefiles
# do the rest: make precache-functional builds the images or finds them in
# the cache, make check-functional-x86_64 picks our tests up. Takes some 20
# minutes for QEMU alone; what was built is used the next time. JOBS is for
# make, CHECKS overrides the goals after the build.

set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
tree=$(cd "${1:?usage: series/built.sh QEMU_SRC}" && pwd)
work=$here/build/built-$(cat "$tree/VERSION")
venv=$here/build/venv/bin

if [ ! -f "$tree/configure" ]; then
    echo "built.sh: $tree: expected a whole QEMU source tree" >&2
    echo "  next: name one that has a file configure" >&2
    exit 2
fi

PATH=$venv:$PATH
for program in gcc ninja pkg-config flex bison; do
    command -v "$program" > /dev/null || missing=1
done
if [ -n "${missing:-}" ] || ! pkg-config --exists glib-2.0; then
    echo "built.sh: this host can't build QEMU; run as root:" >&2
    echo "  apt-get install build-essential pkg-config flex bison" \
        "libglib2.0-dev libfdt-dev libslirp-dev zlib1g-dev" >&2
    exit 4
fi

# A copy with the times of the original, so that only what patches change is
# built again. It is in a folder of this repository, which git must not see.
rm -rf "$work/qemu"
mkdir -p "$work/build"
cp -a "$tree" "$work/qemu"
QEMU_SRC=$tree "$venv/python" -m series patches
for mail in "$here"/build/series/[1-9]-*/*.patch; do
    case $mail in
    */0000-*) ;;
    *) (cd "$work/qemu" &&
        GIT_CEILING_DIRECTORIES=$work git apply "$mail") ;;
    esac
done

# A distribution's source archive has no firmware: take the host's. What
# other targets boot from may be empty.
packed() {
    [ -f "$1" ] || set -- /dev/null "$2"
    if [ ! -e "$work/qemu/pc-bios/$2.bz2" ]; then
        bzip2 -c "$1" > "$work/qemu/pc-bios/$2.bz2"
    fi
}
packed /usr/share/AAVMF/AAVMF_CODE.fd edk2-aarch64-code.fd
packed /usr/share/AAVMF/AAVMF_VARS.fd edk2-arm-vars.fd
packed /usr/share/OVMF/OVMF_CODE_4M.fd edk2-x86_64-code.fd
packed /usr/share/OVMF/OVMF_VARS_4M.fd edk2-i386-vars.fd
for name in arm-code riscv-code riscv-vars i386-code i386-secure-code \
            x86_64-secure-code loongarch64-code loongarch64-vars; do
    packed /dev/null "edk2-$name.fd"
done
for source in "$work"/qemu/pc-bios/dtb/*.dts; do
    [ -e "${source%.dts}.dtb" ] || : > "${source%.dts}.dtb"
done

cd "$work/build"
if [ ! -f build.ninja ]; then
    set --
    for library in slirp pixman:pixman-1; do
        if pkg-config --exists "${library#*:}"; then
            set -- "$@" "--enable-${library%:*}"
        fi
    done
    ../qemu/configure --without-default-features --disable-install-blobs \
        --target-list=x86_64-softmmu,aarch64-softmmu \
        --enable-system --enable-tcg --enable-tools "$@"
fi
nice make -j"${JOBS:-$(nproc)}"

mkdir -p pc-bios qemu-bundle/usr/local/share/qemu
for file in /usr/share/seabios/* /usr/share/qemu/* /usr/lib/ipxe/qemu/* \
            pc-bios/edk2-*; do
    for folder in pc-bios qemu-bundle/usr/local/share/qemu; do
        if [ -f "$file" ] && [ ! -e "$folder/${file##*/}" ]; then
            ln -sf "$(realpath "$file")" "$folder/${file##*/}"
        fi
    done
done

# Where /dev/kvm opens but does not work, QEMU's tests that want KVM hang.
# Images are built outside of that, since it may take a user namespace.
export QEMU_TEST_BUILD_IMAGES=1
cd "$here"
for goal in ${CHECKS:-precache-functional check-functional-x86_64}; do
    case $goal in
    precache*) make -C "$work/build" "$goal" ;;
    *) "$venv/python" -m series.kvm "$work/build/qemu-system-x86_64" \
           "$work" make -C "$work/build" "$goal" ;;
    esac
    # What precaching could not get is not there: no second try
    export QEMU_TEST_NO_DOWNLOAD=1
done
