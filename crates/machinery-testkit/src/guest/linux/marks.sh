#!/bin/sh
# /cgi-bin/marks: what RAM and the disk hold now. The disk is asked, not the kernel's cache of it.
blockdev --flushbufs /dev/vda
read -r ram < /tmp/mark
read -r disk < /dev/vda
printf 'Content-Type: application/json\r\n\r\n{"ram": "%s", "disk": "%s"}\n' "$ram" "$disk"
