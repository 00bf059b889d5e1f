#!/bin/busybox sh
# The user space of CAPE's guest. The snapshot is made when its agent answers.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
# strace of CAPE's analyser writes to /dev/stderr.
ln -sfn /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do
    ln -sfn "/proc/self/fd/${number%:*}" "/dev/${number#*:}"
done

# The names sort in the order of the dependencies.
for module in /modules/*; do
    /bin/busybox insmod "$module"
done

# `net=ADDRESS/BITS` on the kernel's command line.
ip link set lo up
ip link set eth0 up
ip address add "$(sed -n 's/.*\bnet=\([^ ]*\).*/\1/p' /proc/cmdline)" dev eth0

cd /root
python3 /agent.py > /dev/null 2> /dev/ttyS0 &
until /bin/busybox wget -q -O /dev/null http://127.0.0.1:8000/; do
    /bin/busybox usleep 50000
done

echo 'guest ready' > /dev/ttyS0

while true; do
    sleep 3600
done
