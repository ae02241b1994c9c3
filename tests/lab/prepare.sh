#!/bin/sh
# Bring what the project needs to this machine: prepare.sh python|lab
#
# Installed with apt, where missing and only when root: programs that start nothing by themselves.
# Everything else (a kernel, strongSwan, nftables, CPython's own tests) is downloaded and unpacked
# under .lab/root: no daemon starts on this machine, and nothing of its network changes.
set -eu
cd "$(dirname "$0")/../.."
lab=$PWD/.lab
python=${PYTHON:-python3}
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
mkdir -p "$lab/have" "$lab/root" "$lab/deb"

say() { echo "prepare: $*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }

updated=
update() {
    [ -z "$updated" ] || return 0
    [ "$(id -u)" = 0 ] || die "the package lists are missing or old: run 'apt-get update' as root"
    say "apt-get update"
    apt-get update -qq || die "apt-get update failed: is there a network?"
    updated=1
}

known() { [ -n "$(apt-cache policy "$1" 2>/dev/null | grep -v 'Candidate: (none)' | grep Candidate)" ]; }

need_apt() { has apt-get || die "no apt here. $1"; }

# install COMMAND PACKAGE …: what must be in place on the machine itself
wanted=
install_if_missing() { has "$1" || wanted="$wanted $2"; }
install_wanted() {
    [ -n "$wanted" ] || return 0
    need_apt "Please install by hand:$wanted"
    [ "$(id -u)" = 0 ] || die "missing:$wanted. As root: apt-get install --no-install-recommends$wanted"
    for package in $wanted; do known "$package" || update; done
    say "installing:$wanted"
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $wanted >"$lab/apt.log" 2>&1 ||
        { update; apt-get install -y -qq --no-install-recommends $wanted >"$lab/apt.log" 2>&1; } ||
        { tail -5 "$lab/apt.log" >&2; die "apt-get could not install:$wanted"; }
    wanted=
}

# unpack PACKAGE …: download and unpack under .lab/root, once
unpack() {
    count=$#
    number=0
    for package in "$@"; do
        number=$((number + 1))
        [ ! -e "$lab/have/$package" ] || continue
        say "[$number/$count] fetching $package"
        fetch "$package" || { update; fetch "$package"; } || die "could not download $package"
        dpkg -x "$lab/deb/$package"_*.deb "$lab/root"
        rm -f "$lab/deb/$package"_*.deb
        touch "$lab/have/$package"
    done
}
fetch() { (cd "$lab/deb" && rm -f "$1"_*.deb && apt-get -qq -o APT::Sandbox::User=root download "$1") >"$lab/apt.log" 2>&1; }

# missing PACKAGE …: those that this machine lacks, with what they depend on
missing() {
    plan="apt-get install -s --no-install-recommends"
    $plan "$@" >"$lab/plan" 2>"$lab/apt.log" || { update; $plan "$@" >"$lab/plan" 2>"$lab/apt.log"; } ||
        { cat "$lab/apt.log" >&2; die "apt cannot tell what these depend on: $*"; }
    sed -n 's/^Inst \([^ ]*\) (.*/\1/p' "$lab/plan" | grep -v -E '^(udev|tpm-udev|adduser)$' || true
}

prepare_python() {
    has "$python" || wanted=" python3 python3-venv"
    install_if_missing ip iproute2  # the tests make network namespaces
    install_wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "Python 3.11 or newer is needed, and $python is not: make … PYTHON=/path/to/python3.11"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || wanted="$wanted python3-venv"
    install_wanted
    "$python" -c 'import test.test_asyncio' 2>/dev/null && return 0
    has apt-get || { say "no apt here: CPython's own tests are not fetched"; return 0; }
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    suite=lib$version-testsuite
    known "$suite" || update
    unpack "$suite"
    # The package leaves out what the standard library has of them.
    library=$("$python" -c 'import os; print(os.path.dirname(os.__file__))')
    [ ! -d "$library/test" ] || cp -rsn "$library/test/." "$lab/root/usr/lib/$version/test/"
}

prepare_kernel() {
    [ "$(uname -m)" = x86_64 ] || die "the lab's virtual machine is for x86-64 only"
    install_if_missing qemu-system-x86_64 qemu-system-x86
    install_if_missing busybox busybox-static
    install_if_missing strings binutils  # virtme-ng runs both
    install_if_missing file file
    install_wanted
    if ! ls "$lab"/root/boot/vmlinuz-* >/dev/null 2>&1; then
        meta=linux-image-amd64
        known $meta || { update; known $meta || meta=linux-image-generic; }
        known $meta || die "apt knows no kernel package"
        unpack $(apt-cache depends --no-recommends --no-suggests $meta |
            sed -n 's/^ *Depends: \(linux-\(image\|modules\)-[0-9].*\)/\1/p')
        version=$(basename "$lab"/root/boot/vmlinuz-* | sed s/vmlinuz-//)
        if [ -d "$lab/root/usr/lib/modules" ]; then  # Debian 13 has moved them
            mkdir -p "$lab/root/lib"
            ln -sfn ../usr/lib/modules "$lab/root/lib/modules"
        fi
        [ -d "$lab/root/lib/modules/$version/kernel" ] || unpack "linux-modules-$version"
        depmod -b "$lab/root" "$version"
    fi
    # virtme-ng unpacks the modules that it boots with.
    packed() { [ -n "$(find "$lab/root/lib/modules/" -name "*.ko.$1" -print -quit)" ]; }
    ! packed zst || install_if_missing zstd zstd
    ! packed xz || install_if_missing xz xz-utils
    install_wanted
}

prepare_lab() {
    need_apt "The lab needs apt to fetch a kernel and strongSwan."
    install_if_missing modprobe kmod
    install_wanted
    if "$python" tests/lab/run.py --native; then
        say "this machine's kernel has ESP: no virtual machine is needed"
    else
        prepare_kernel
    fi
    tools="strongswan-charon strongswan-swanctl libcharon-extra-plugins
        libstrongswan-standard-plugins nftables"
    [ "$(cat "$lab/have/tools" 2>/dev/null)" != "$tools" ] || return 0
    known strongswan-charon || update
    # shellcheck disable=SC2086
    packages=$(missing $tools)
    # shellcheck disable=SC2086
    unpack $packages
    echo "$tools" >"$lab/have/tools"
}

case ${1-} in
    python) prepare_python ;;
    lab) prepare_lab ;;
    *) die "usage: prepare.sh python|lab" ;;
esac
