#!/bin/sh
# /cgi-bin/marks: shows the marks in RAM and on the disk. It reads the disk, not the kernel's cache.
blockdev --flushbufs /dev/vda
read -r ram < /tmp/mark
read -r disk < /dev/vda
printf 'Content-Type: application/json\r\n\r\n{"ram": "%s", "disk": "%s"}\n' "$ram" "$disk"
