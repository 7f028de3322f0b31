"""What the servers on 127.0.0.1 have in common: life, planned faults, answers, connections cut the hard way."""

import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class LoopbackServer:
    """Life of a server, and what shall go wrong with it; a context manager."""

    def __init__(self, handler: type["LoopbackHandler"], port: int = 0) -> None:
        self.faults: list[Any] = []  # each with `times`, how often it still happens
        self.lock = threading.RLock()
        self.httpd = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.httpd.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def take_fault(self, meant: Callable[[Any], bool] = lambda fault: True) -> Any:
        """The first fault left that is meant, which then has happened once more; None without."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and meant(fault):
                    fault.times -= 1
                    return fault
        return None


class LoopbackHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for head and body

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def cut(self) -> None:
        """Ends the connection the hard way: the client sees a reset, not an orderly close."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            pass  # cut

    def log_message(self, *_: object) -> None:
        pass
