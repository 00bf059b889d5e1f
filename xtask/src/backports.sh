# Runs a command with a folder's `usr` mounted over the system's /usr. For a mount namespace of its own:
#
#     unshare --mount sh backports.sh FOLDER COMMAND…
set -eu
folder=$1
shift

# A relative path: the folder's own name could contain a colon or a comma, which separate options.
(cd "$folder" && mount -t overlay overlay -o lowerdir=usr:/usr /usr)

# The programs load all files of these folders. A module of the system's build would make QEMU abort.
for loaded in libvirt qemu; do
    loaded=usr/lib/x86_64-linux-gnu/$loaded
    mount --bind "$folder/$loaded" "/$loaded"
done

exec "$@"
