"""`rlscale report --live`: the report served on loopback, drawn again as runs go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlscale.errors import UserError
from rlscale.scaling.report import page, plotly_script, report_data

_HOST = "127.0.0.1"
_POLL_S = 5
_RECORDS = ("status.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl")


def live_server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server bound to loopback; call `serve_forever` on it. Its page asks for news every few seconds.

    Args:
        port: 0 takes a free one; `server.server_address` tells which.

    Raises:
        UserError: the port is taken, there are no runs, or Plotly is not installed.
    """
    plotly_script()
    report = _Report(folders)
    report.current()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            # A page from elsewhere must not read this one under a name of its own.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in (_HOST, "localhost"):
                self._answer(403, "text/plain", "this report answers to localhost alone")
            elif url.path not in ("/", "/data"):
                self._answer(404, "text/plain", "there is / and /data")
            else:
                try:
                    data = report.current()
                except UserError as error:
                    self._answer(503, "text/plain", str(error))
                    return
                if url.path == "/":
                    self._answer(200, "text/html", page(data))
                elif parse_qs(url.query).get("stamp") == [data["stamp"]]:
                    self._answer(204, "application/json", "")
                else:
                    self._answer(200, "application/json", json.dumps(data, allow_nan=False))

        def log_message(self, format: str, *args: Any) -> None:
            """The terminal stays the sweep's."""

        def _answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    try:
        return ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be served ({error.strerror}): choose another --port") from None


class _Report:
    """The report's data, made again when the runs' files have changed.

    Making it takes a core, which the runs may need: nine tenths of the time are left to them.
    """

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self._lock = Lock()
        self._data: dict[str, Any] = {"stamp": None}
        self._rest_until = 0.0

    def current(self) -> dict[str, Any]:
        with self._lock:
            stamp = self._stamp()
            started = time.monotonic()
            if stamp != self._data["stamp"] and started >= self._rest_until:
                self._data = report_data(self._folders) | {"stamp": stamp, "live_s": _POLL_S}
                ended = time.monotonic()
                self._rest_until = ended + 9 * (ended - started)
            return self._data

    def _stamp(self) -> str:
        """Changes whenever a record grows."""
        sizes, newest = 0, 0
        for folder in self._folders:
            for root, _, names in os.walk(folder):
                for name in names:
                    if name in _RECORDS:
                        found = os.stat(os.path.join(root, name))
                        sizes, newest = sizes + found.st_size, max(newest, found.st_mtime_ns)
        return f"{sizes}-{newest}"
