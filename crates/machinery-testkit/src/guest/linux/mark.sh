#!/bin/sh
# /cgi-bin/mark?ram=X&disk=Y: leaves X in RAM and Y on the disk, for good, before it answers.
# /cgi-bin/mark?fill=N: goes on to write N MiB to the disk, behind the mark.
IFS='&'
for pair in $QUERY_STRING; do
    value=${pair#*=}
    case $pair in
        ram=*) echo "$value" > /tmp/mark ;;
        disk=*) printf '%-511s\n' "$value" | dd of=/dev/vda bs=512 conv=notrunc,fsync 2> /dev/null ;;
        fill=*) dd if=/tmp/noise of=/dev/vda bs=1M seek=1 count="$value" conv=notrunc,fsync > /dev/null 2>&1 & ;;
    esac
done
exec /www/cgi-bin/marks
