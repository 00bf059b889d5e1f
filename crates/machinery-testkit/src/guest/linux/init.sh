#!/bin/busybox sh
# The user space of the Linux test guest. At its end it sleeps until the power button is pressed.

/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs -o size=100% none /tmp

# The names sort in the order of the dependencies.
for module in /modules/*; do
    insmod "$module"
done

# `net=ADDRESS/BITS,HOST,MAC` on the kernel's command line: a network with only that host, to which the guest
# sends traffic. The host need not exist yet. Without it, the guest has QEMU's user networking, whose
# addresses are fixed.
net=$(sed -n 's/.*\bnet=\([^ ]*\).*/\1/p' /proc/cmdline)
ip link set lo up
ip link set eth0 up
if [ -n "$net" ]; then
    wire=${net#*,}
    host=${wire%,*}
    ip address add "${net%%,*}" dev eth0
    arp -s "$host" "${wire#*,}"
    talk "$host"
else
    ip address add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
fi

# `noise=MIB` on the kernel's command line: incompressible RAM. Random bytes are slow on an emulated
# processor, so one block of them is repeated. The block is larger than the windows of gzip, lz4 and zstd.
noise=$(sed -n 's/.*\bnoise=\([0-9]*\).*/\1/p' /proc/cmdline)
noise=${noise:-0}
block=16
[ "$noise" -lt "$block" ] && block=$noise
if [ "$block" -gt 0 ]; then
    dd if=/dev/urandom of=/tmp/noise bs=1M count="$block" 2>/dev/null
    made=$block
    while [ "$made" -lt "$noise" ]; do
        made=$((made + block))
        dd if=/tmp/noise bs=1M count="$block" 2>/dev/null
    done > /tmp/noise.more
fi

# A restored machine must show these marks.
QUERY_STRING='ram=snapshot&disk=snapshot' /www/cgi-bin/mark > /dev/null

httpd -p 8000 -h /www -c /etc/httpd.conf

for event in /sys/class/input/event*; do
    [ "$(cat "$event/device/name")" = 'Power Button' ] && button=/dev/input/${event##*/}
done

# The snapshot is made while traffic flows.
while [ -n "$net" ] && [ "$(cat /sys/class/net/eth0/statistics/tx_packets)" -lt 100 ]; do
    usleep 10000
done

echo 'guest ready' > /dev/ttyS0

# One input event is 24 bytes; reading it sleeps until the button is pressed.
dd if="$button" of=/dev/null bs=24 count=1 2> /dev/null
poweroff -f
