"""Web servers on 127.0.0.1 that misbehave on demand, for the tests of what downloads."""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def answering(answer):
    """The address of a server that answers every call with these bytes, whatever they are"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                with connection, contextlib.suppress(OSError):  # a client that hangs up
                    connection.settimeout(1)
                    connection.recv(1 << 16)
                    connection.sendall(answer)
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class FlakyServer:
    """
    files: {"/name": bytes}. faults: {"/name": [fault, …]}, one taken off per request, then all is well:
    a status ("404", "429", …), "truncate" and "stall" (after half of what was asked for), "short" (claims fewer bytes
    than there are), "no_length", "wrong_range", or "redirect:/other". requests: (path, Range header) as they came;
    methods: GET or HEAD, of each.
    """

    def __init__(self):
        self.files, self.faults, self.requests, self.headers, self.methods = {}, {}, [], [], []
        self.ranges, self.etag = True, '"1"'
        self.stop = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def do_HEAD(self):
                owner.answer(self, body=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hangs up is nothing special here
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, h, body=True):
        path = h.path.partition("?")[0]
        self.requests.append((path, h.headers.get("Range")))
        self.headers.append(dict(h.headers))
        self.methods.append(h.command)
        faults = self.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdigit() or path not in self.files:
            h.send_response(int(fault or 404))
            h.send_header("Retry-After", "0")
            h.end_headers()
            return
        if fault.startswith("redirect:"):
            h.send_response(302)
            h.send_header("Location", fault.removeprefix("redirect:"))
            h.end_headers()
            return

        content, start = self.files[path], 0
        total = len(content)
        if self.ranges and (wanted := h.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                h.send_response(416)
                h.end_headers()
                return
            h.send_response(206)
            claimed = start + 1 if fault == "wrong_range" else start
            h.send_header("Content-Range", f"bytes {claimed}-{total - 1}/{total}")
        else:
            h.send_response(200)
        content = content[start:]
        if fault == "short":
            content = content[:-3]
        if fault != "no_length":
            h.send_header("Content-Length", str(len(content)))
        if self.etag:
            h.send_header("ETag", self.etag)
        h.end_headers()
        if not body:
            return
        if fault in ("truncate", "stall"):
            h.wfile.write(content[: len(content) // 2])
            h.wfile.flush()
            if fault == "stall":
                self.stop.wait()
            return
        h.wfile.write(content)
