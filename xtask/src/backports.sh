# Runs a command with the files of a folder's `usr` over those of the system's /usr. It is for a mount
# namespace of its own:
#
#     unshare --mount sh backports.sh FOLDER COMMAND…
set -eu
folder=$1
shift

# Named from within the folder, whose own name could have a colon or a comma, which mean something here.
(cd "$folder" && mount -t overlay overlay -o lowerdir=usr:/usr /usr)

# Whatever lies in these is loaded. What only the system's versions have must not show through: they are
# of another build, and QEMU aborts when it meets a module of one.
for loaded in libvirt qemu; do
    loaded=usr/lib/x86_64-linux-gnu/$loaded
    mount --bind "$folder/$loaded" "/$loaded"
done

exec "$@"
