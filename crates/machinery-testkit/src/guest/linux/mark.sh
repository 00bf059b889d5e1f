#!/bin/sh
# /cgi-bin/mark?ram=X&disk=Y: leaves X in RAM and Y on the disk, for good, before it answers.
IFS='&'
for pair in $QUERY_STRING; do
    value=${pair#*=}
    case $pair in
        ram=*) echo "$value" > /tmp/mark ;;
        disk=*) printf '%-511s\n' "$value" | dd of=/dev/vda bs=512 conv=notrunc,fsync 2> /dev/null ;;
    esac
done
exec /www/cgi-bin/marks
