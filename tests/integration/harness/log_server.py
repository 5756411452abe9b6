"""The part of a kubelet that the API server asks for logs: HTTPS on loopback, lines that the test appends."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

from .api import Api
from .certificates import Authority


class LogServer:
    """Serves `/containerLogs/<namespace>/<pod>/<container>` for one node; use it in a `with` block."""

    def __init__(self, folder: Path) -> None:
        self._changed = threading.Condition()
        self._lines: dict[str, list[str]] = {}
        self._ended: set[str] = set()
        self.asked: list[str] = []
        """Names of the containers that were asked for, in order."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        certificate, key = Authority("kubelet-ca").server("node").write(folder, "kubelet")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> LogServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended.update(self._lines)
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def serve_for(self, api: Api, node: str) -> None:
        """Tell the API server that this is where the node's kubelet is."""
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
        }
        api.patch({"kind": "Node", "metadata": {"name": node}}, {"status": status}, "status")

    def write(self, pod: str, *lines: str) -> None:
        """Append lines to a pod's log."""
        with self._changed:
            self._lines.setdefault(pod, []).extend(lines)
            self._changed.notify_all()

    def end(self, pod: str) -> None:
        """No more lines will come: followers are let go."""
        with self._changed:
            self._ended.add(pod)
            self._changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        log = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                _, _, _, pod, container = parts.path.split("/")
                query = parse_qs(parts.query)
                log.asked.append(container)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for line in log._following(pod, query):
                    data = f"{line}\n".encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the test says what is wrong."""

        return Handler

    def _following(self, pod: str, query: dict[str, list[str]]) -> list[str] | _Follower:
        with self._changed:
            lines = self._lines.get(pod, [])
            tail = query.get("tailLines")
            begin = max(0, len(lines) - int(tail[0])) if tail else 0
            return _Follower(self, pod, begin) if query.get("follow") == ["true"] else lines[begin:]

    def _next(self, pod: str, index: int) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._lines.get(pod, [])) > index or pod in self._ended)
            lines = self._lines.get(pod, [])
            return lines[index] if len(lines) > index else None


class _Follower:
    """The lines of a pod from one on, as they come."""

    def __init__(self, log: LogServer, pod: str, index: int) -> None:
        self._log, self._pod, self._index = log, pod, index

    def __iter__(self) -> _Follower:
        return self

    def __next__(self) -> str:
        line = self._log._next(self._pod, self._index)
        if line is None:
            raise StopIteration
        self._index += 1
        return line
