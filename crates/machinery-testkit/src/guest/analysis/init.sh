#!/bin/busybox sh
# The user space of the analysis guest. The snapshot is made when its agent answers.

/bin/busybox mkdir -p /proc /sys /dev /tmp /desktop
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev

# The names sort in the order of the dependencies.
for module in /modules/*; do
    insmod "$module"
done

# `address=ADDRESS/BITS` on the kernel's command line.
ip link set lo up
ip link set eth0 up
ip address add "$(sed -n 's/.*\baddress=\([^ ]*\).*/\1/p' /proc/cmdline)" dev eth0

# Python writes its compiled modules, so that the programs of an analysis start faster.
python -c 'import base64, json, os, socket, struct, subprocess, time'

cd /agent
python /agent/start.py > /dev/null 2> /dev/ttyS0 &
until wget -q -O /dev/null http://127.0.0.1:8000/; do
    usleep 50000
done

echo 'guest ready' > /dev/ttyS0

while true; do
    sleep 3600
done
