"""An agent for test guests that speaks the protocol of Cuckoo's agent 0.10, under Python 2.7 and 3.

    python agent.py [--again] [HOST [PORT]]

Requests are plain HTTP; parameters are a form. The answer is a JSON object with a `message`.

A sandbox deletes the agent's file and ends the agent, because the restore of the machine brings both back. A
machine without a restore needs `--again`: the agent then keeps its file, and serves one analysis after another.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
import zipfile

try:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from urllib.parse import parse_qs
except ImportError:
    from BaseHTTPServer import BaseHTTPRequestHandler, HTTPServer
    from urlparse import parse_qs

VERSION = "0.10"
FEATURES = ["execpy", "pinning", "logs", "largefile", "unicodepath"]


class Refused(Exception):
    """An answer with another status than 200."""

    def __init__(self, status, message):
        Exception.__init__(self, message)
        self.status = status


class Form(dict):
    """The parameters of a request: strings, and the bytes of files."""

    def need(self, name):
        if name not in self:
            raise Refused(400, "the parameter %s is missing" % name)
        return self[name]

    def path(self, name):
        return native(self.need(name))


class State:
    again = False
    client = None
    status = {"status": None, "description": None}


def native(path):
    """Returns a path of Windows, which sandboxes send, in the form of this system."""
    return path.replace("\\", os.sep)


def read_form(kind, body):
    if not kind.startswith("multipart/form-data"):
        return Form((name, values[-1]) for name, values in parse_qs(body.decode("utf-8"), True).items())
    form = Form()
    boundary = re.search('boundary="?([^";]+)', kind).group(1).encode("ascii")
    # The first piece is empty, and the last one ends the form.
    for piece in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:-1]:
        head, _, content = piece.partition(b"\r\n\r\n")
        name = re.search(b'[; ]name="([^"]*)"', head).group(1).decode("utf-8")
        form[name] = content if b"filename=" in head else content.decode("utf-8")
    return form


def run(command, form):
    """Runs a command to its end, or only starts it."""
    options = {"shell": "shell" in form, "cwd": native(form["cwd"]) if "cwd" in form else None}
    if "async" in form:
        subprocess.Popen(command, **options)
        return {"stdout": None, "stderr": None}
    pipe = subprocess.PIPE
    out, err = subprocess.Popen(command, stdout=pipe, stderr=pipe, **options).communicate()
    return {"stdout": out.decode("utf-8", "replace"), "stderr": err.decode("utf-8", "replace")}


def pin(client):
    if State.client:
        raise Refused(500, "another client has pinned the agent")
    State.client = client
    return {"client_ip": client}


def set_status(form):
    State.status = {"status": form.need("status"), "description": form.get("description")}


def make_file(form):
    handle, path = tempfile.mkstemp(form.get("suffix", ""), form.get("prefix", "tmp"), form.get("dirpath"))
    os.close(handle)
    return {"filepath": path}


def make_temporary(form):
    return {"dirpath": tempfile.mkdtemp(form.get("suffix", ""), form.get("prefix", "tmp"), form.get("dirpath"))}


def store(form):
    with open(form.path("filepath"), "wb") as stored:
        stored.write(form.need("file"))


def extract(form):
    with tempfile.TemporaryFile() as packed:
        packed.write(form.need("zipfile"))
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(form.path("dirpath"))
    # Windows has no permission to execute.
    for folder, _, names in os.walk(form.path("dirpath")):
        for name in names:
            os.chmod(os.path.join(folder, name), 0o755)


def remove(form):
    path = form.path("path")
    if State.again and os.path.abspath(path) == os.path.abspath(__file__):
        return
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)
    else:
        raise Refused(404, "there is no %s" % path)


def kill(server):
    State.client = None
    if not State.again:
        # The server waits for the end of this request.
        threading.Thread(target=server.shutdown).start()


ROUTES = {
    "GET /": lambda form: {"message": "Agent of a test guest", "version": VERSION, "features": FEATURES},
    "GET /status": lambda form: State.status,
    "POST /status": set_status,
    "GET /logs": lambda form: {"stdout": "", "stderr": ""},
    "GET /system": lambda form: {"system": platform.system()},
    "GET /environ": lambda form: {"environ": dict(os.environ)},
    "GET /path": lambda form: {"filepath": os.path.abspath(__file__)},
    "POST /mkdir": lambda form: os.makedirs(form.path("dirpath"), int(form.get("mode", 0o777))),
    "GET /mktemp": make_file,
    "POST /mktemp": make_file,
    "GET /mkdtemp": make_temporary,
    "POST /mkdtemp": make_temporary,
    "POST /store": store,
    "POST /extract": extract,
    "POST /remove": remove,
    "POST /execute": lambda form: run(native(form.need("command")), form),
    "POST /execpy": lambda form: run([sys.executable, form.path("filepath")], form),
}


class Handler(BaseHTTPRequestHandler):
    server_version = "Agent/" + VERSION

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def handle_request(self, method):
        if State.client not in (None, self.client_address[0]):
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            form = read_form(self.headers.get("Content-Type") or "", body)
            answer = self.answer("%s %s" % (method, self.path), form)
            status = 200
        except Refused as refused:
            status, answer = refused.status, {"message": str(refused), "error_code": refused.status}
        except Exception as error:
            status = 500
            answer = {"message": str(error), "error_code": 500, "traceback": traceback.format_exc()}
        if not isinstance(answer, bytes):
            answer = json.dumps(dict({"message": "done"}, **(answer or {}))).encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def answer(self, route, form):
        if route == "GET /pinning":
            return pin(self.client_address[0])
        if route == "GET /kill":
            return kill(self.server)
        if route == "POST /retrieve":
            with open(form.path("filepath"), "rb") as wanted:
                return wanted.read()
        if route not in ROUTES:
            raise Refused(404, "there is no %s" % route)
        return ROUTES[route](form)

    def log_message(self, *_):
        pass


def main(arguments):
    State.again = "--again" in arguments
    address = [argument for argument in arguments if argument != "--again"]
    host, port = (address + ["0.0.0.0", "8000"][len(address):])[:2]
    HTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
