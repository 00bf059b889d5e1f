#!/bin/sh
# talk HOST: talks to the host without end. No answer is needed, and none disturbs.

# A running number every few milliseconds, as syslog. The one program that sends has no end, so that
# no number is skipped.
syslogd -R "$1"
n=0
while true; do
    n=$((n + 1))
    echo "$n"
    usleep 1000
done | logger &

# What the host may answer, or refuse.
while true; do
    timeout 1 nslookup example.org "$1"
    echo 'not an agent' | nc -w 1 "$1" 8000
    usleep 50000
done > /dev/null 2>&1 &

# For the result server's ears, by all ways.
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
