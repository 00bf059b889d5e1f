#!/bin/sh
# /cgi-bin/mark?ram=X&disk=Y: writes X to RAM and Y to the disk before it answers.
# /cgi-bin/mark?fill=N: writes N MiB to the disk, behind the mark, also after the answer.
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
