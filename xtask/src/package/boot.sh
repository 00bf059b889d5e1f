# Boots a systemd in the root of this process, and runs lifecycle.sh, beside this file, under it with the given arguments.
# For mount and process namespaces of their own, such as those of a fresh root.
set -eu
here=$(dirname "$0")
# The number of this process is that of another namespace.
cgroup=package-$(cat /proc/sys/kernel/random/uuid)

export DEBIAN_FRONTEND=noninteractive
apt-get -q update
# A Debian that runs services has systemd. The plugin's own dependency comes here, so that it is no leftover later.
apt-get -q install -y --no-install-recommends systemd libvirt0
ln -sf /dev/null /etc/systemd/system/apt-daily.timer
ln -sf /dev/null /etc/systemd/system/apt-daily-upgrade.timer

cat > /run/boot.sh <<'END'
mount -t tmpfs tmpfs /run
mount -t proc proc /proc
# Without the cgroups of this computer below it, which may be of version 1.
umount -R -l /sys
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$1"
echo 0 > "/sys/fs/cgroup/$1/cgroup.procs"
# As in any container, systemd changes neither devices nor the settings of the kernel.
mount -t tmpfs -o mode=755 tmpfs /mnt
for device in null zero full random urandom tty; do
    : > "/mnt/$device"
    mount --bind "/dev/$device" "/mnt/$device"
done
mkdir /mnt/shm /mnt/pts
mount -t tmpfs tmpfs /mnt/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts /mnt/pts
ln -s pts/ptmx /mnt/ptmx
ln -s /proc/self/fd /mnt/fd
mount --move /mnt /dev
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
exec unshare --cgroup sh -c '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec env -i container=fresh PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --system --unit=sysinit.target --log-target=console --show-status=no
'
END
unshare --mount --pid --uts --ipc --fork --kill-child sh -eu /run/boot.sh "$cgroup" > /run/systemd.log 2>&1 < /dev/null &
unshare=$!

end() {
    code=$?
    if [ $code -ne 0 ]; then
        echo "==> the log of systemd" >&2
        tail -n 50 /run/systemd.log >&2
    fi
    kill -KILL $unshare 2> /dev/null || true
    wait $unshare 2> /dev/null || true
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # The kernel empties the groups of killed processes a moment later.
    for try in $(seq 100); do
        find "/sys/fs/cgroup/$cgroup" -depth -type d -exec rmdir {} + 2> /dev/null && break
        sleep 0.2
    done
    exit $code
}
trap end EXIT

# There is no event for systemd's readiness that a process outside of its namespaces can wait for.
first=
for try in $(seq 600); do
    first=$(cat "/proc/$unshare/task/$unshare/children" 2> /dev/null) || { echo "systemd has ended" >&2; exit 1; }
    first=${first% }
    [ -n "$first" ] && nsenter --target "$first" --mount --pid systemctl --quiet is-active sysinit.target 2> /dev/null && break
    sleep 0.1
done
nsenter --target "$first" --mount --pid --uts --ipc --cgroup sh -eu "$here/lifecycle.sh" "$@"
