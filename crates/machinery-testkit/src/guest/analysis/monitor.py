"""The stand-in for Cuckoo's monitor for Windows: polls /proc and the folder of the sample.

    monitor.py HOST:PORT SAMPLE

Sends processes, new files and a screenshot to Cuckoo's result server. Each result has a connection of its own,
which begins with its kind. An event is a length of three bytes, a kind, and a message of protobuf."""

import base64
import os
import socket
import struct
import sys
import time

INTERVAL = 0.1
CREATED, TERMINATED, EXISTING = 0, 1, 2
PROCESS = 1
# The guest has no graphics: a grey square.
SCREEN = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP////////////////////////////////////////////////////////////////////"
    "//////////////////wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEA"
    "AD8AP//Z"
)


class ResultServer:
    def __init__(self, address):
        host, port = address.split(":")
        self.address = (host, int(port))

    def open(self, header):
        result = socket.create_connection(self.address)
        result.sendall(header.encode() + b"\n")
        return result

    def send(self, header, content):
        result = self.open(header)
        result.sendall(content)
        result.close()


def varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def message(fields):
    encoded = b""
    for number, value in sorted(fields.items()):
        if isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
        else:
            encoded += varint(number << 3 | 2) + varint(len(value)) + value
    return encoded


def process(pid):
    """Returns the parent and the arguments of a process that runs a program."""
    try:
        with open("/proc/%d/stat" % pid) as stat, open("/proc/%d/cmdline" % pid, "rb") as cmdline:
            parent = stat.read().rpartition(")")[2].split()[1]
            return int(parent), tuple(cmdline.read().split(b"\0")[:-1])
    except (IOError, OSError):
        return 0, ()


def program(arguments):
    """Returns the program; the script, if it is an interpreter's."""
    scripts = [argument for argument in arguments[1:] if not argument.startswith(b"-")]
    return scripts[0] if b"python" in arguments[0] and scripts else arguments[0]


class Monitor:
    def __init__(self, server, sample):
        self.server, self.folder, self.begun = server, os.path.dirname(sample), time.time()
        self.events = server.open("FILE\nlogs/threemon.pb")
        self.files = {os.path.basename(sample): None}
        self.candidates, self.processes = {}, {}
        for pid, found in self.running().items():
            self.report(EXISTING, pid, found)

    def running(self):
        found = {pid: process(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
        return {pid: found[pid] for pid in found if found[pid][1]}

    def report(self, status, pid, found):
        parent, arguments = found
        fields = {1: status, 2: pid, 3: parent, 4: program(arguments), 5: b" ".join(arguments)}
        fields.update({7: int((time.time() - self.begun) * 1000), 8: 0})
        body = message(fields)
        self.events.sendall(struct.pack("<I", len(body) | PROCESS << 24) + body)
        if status == TERMINATED:
            del self.processes[pid]
        else:
            self.processes[pid] = found

    def poll(self):
        running = self.running()
        for pid in sorted(running):
            # A new process may still have its parent's arguments.
            if pid not in self.processes and self.candidates.get(pid) == running[pid]:
                self.report(CREATED, pid, running[pid])
        for pid in set(self.processes) - set(running):
            self.report(TERMINATED, pid, self.processes[pid])
        self.candidates = running
        for name in sorted(os.listdir(self.folder)):
            self.look_at(name)

    def look_at(self, name):
        """Sends a file that has not grown since the last poll. None is the size of a known file."""
        size, path = self.files.get(name, -1), os.path.join(self.folder, name)
        if size is not None and size == os.path.getsize(path):
            with open(path, "rb") as file:
                self.server.send("FILE\nfiles/" + name, file.read())
            self.files[name] = None
        elif size is not None:
            self.files[name] = os.path.getsize(path)


def main(address, sample):
    server = ResultServer(address)
    monitor = Monitor(server, sample)
    sys.stdout.write("ready\n")
    sys.stdout.close()
    server.send("SCREENSHOT", SCREEN)
    while True:
        time.sleep(INTERVAL)
        monitor.poll()


main(*sys.argv[1:])
