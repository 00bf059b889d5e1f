#!/bin/busybox sh
# The init of the installed Debian. Its initramfs has mounted /proc, /sys and /dev.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin
ip() { busybox ip "$@"; }

# The initramfs loads only the modules of disks.
modprobe virtio_net
while [ -z "$(ls /sys/class/net | grep -v '^lo$')" ]; do busybox usleep 10000; done
card=$(ls /sys/class/net | grep -v '^lo$')

ip link set lo up
ip address add 192.168.30.11/24 dev "$card"
ip link set "$card" up
ip route add default via 192.168.30.1

busybox httpd -p 80 -h /www
busybox httpd -p 8000 -h /www
echo 'guest ready' > /dev/ttyS0

while true; do busybox sleep 3600; done
