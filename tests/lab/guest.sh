#!/bin/sh
# The lab's side in the virtual machine: make the host's files a fast throw-away root, run the command.
# run.py shares two directories: the host's root, read only (tag "labroot"), and the run's own (tag "labrun").
set -e
dmesg -n 1 2>/dev/null || true
nine=trans=virtio,version=9p2000.L,msize=512000
mkdir -p /run/lab/host /run/lab/upper /run/lab/work /run/lab/root /run/lab/run
mount -t 9p -o "$nine" labrun /run/lab/run
# The host's files do not change under the run: caching makes Python start three times as fast.
mount -t 9p -o "$nine,cache=loose,ro" labroot /run/lab/host
mount -t overlay -o lowerdir=/run/lab/host,upperdir=/run/lab/upper,workdir=/run/lab/work lab /run/lab/root
for directory in proc sys dev run; do
    mount --rbind "/$directory" "/run/lab/root/$directory"
done
modules=$(readlink -f /lib/modules/"$(uname -r)")
mkdir -p "/run/lab/root/lib/modules/$(uname -r)"
mount --bind "$modules" "/run/lab/root/lib/modules/$(uname -r)"
# strongSwan looks for its plugins in one place only.
unpacked=$(dirname "$(readlink -f "$0")")/../../.lab/root/usr/lib/ipsec
[ -e /run/lab/root/usr/lib/ipsec ] || ln -s "$(readlink -f "$unpacked")" /run/lab/root/usr/lib/ipsec
hostname lab
ip link set lo up
# Loading these by need costs IKE its patience.
chroot /run/lab/root modprobe -aq xfrm_user esp4 gcm ghash-generic ghash-clmulni-intel ctr seqiv drbg \
    jitterentropy_rng sha512-ssse3 cbc authenc echainiv esp6 nf_tables nft_xfrm nft_socket nft_fib_inet &
touch /run/lab/run/started
chroot /run/lab/root /bin/sh /run/lab/run/command >/run/lab/run/output 2>&1 </dev/null && code=0 || code=$?
echo "$code" >/run/lab/run/exit
sync
