#!/bin/sh
# talk HOST: sends traffic to the host without end. It needs no answers.

# A running number every few milliseconds, as syslog. One process sends all of them, so that none is skipped.
syslogd -R "$1"
n=0
while true; do
    n=$((n + 1))
    echo "$n"
    usleep 1000
done | logger &

# Traffic that the host may answer or refuse.
while true; do
    timeout 1 nslookup example.org "$1"
    echo 'not an agent' | nc -w 1 "$1" 8000
    usleep 50000
done > /dev/null 2>&1 &

# Traffic for the result server, over UDP and TCP.
while true; do
    timeout 1 tftp -g -r results -l /dev/null "$1" 2042
    usleep 50000
done > /dev/null 2>&1 &
while true; do
    while echo results; do
        usleep 50000
    done | nc -w 1 "$1" 2042
    usleep 50000
done > /dev/null 2>&1 &
