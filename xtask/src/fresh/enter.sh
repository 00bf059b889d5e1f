# Runs a command with a folder as its root. For mount and process namespaces of its own:
#
#     unshare --mount --pid --fork sh enter.sh ROOT [FROM TO]… -- COMMAND…
#
# Each file or folder FROM of the system is mounted at TO, which must exist in the root.
set -eu
root=$1
shift

# The new root must be a mount point. So must the root in which `unshare` works: it makes the mounts of the
# new namespace private from the root on.
mount --bind "$root" "$root"
while [ "$1" != -- ]; do
    mount --bind "$1" "$root$2"
    shift 2
done
shift

mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"

cd "$root"
pivot_root . mnt
umount -l /mnt
cd

# No `exec`: the first process of a process namespace must reap orphans, as this shell does.
"$@"
exit
