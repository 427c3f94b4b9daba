"""The http server of view.py's page: who is answered, and how.

    Server(Studio(...), "127.0.0.1", 0).serve_forever()

A request is POST /NAME of JSON (of a photo: its bytes, with the rest in the address), answered by
the method of that name of a studio.Studio; an error is {"error": one line}.
"""

import hmac
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from views import photos
from views.studio import Stopped, line_of

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
REQUESTS = "open photo scene model picture truth view preset path film progress stop file".split()
WITHOUT_PHOTO = ("open", "photo", "scene", "model")
MOST_JSON = 2**20               # bytes of a request that is no photo
PATIENCE = 60.0                 # seconds that a silent connection is kept
POLICY = ("default-src 'none'; img-src blob: data:; media-src blob:; connect-src 'self'; "
          "script-src 'nonce-{0}'; style-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


class Refused(Exception):
    """A request that is not answered: HTTP status, one line."""


class Handler(BaseHTTPRequestHandler):
    """A connection. Only pages that this server has served, to who knew its token, are answered."""
    protocol_version, timeout = "HTTP/1.1", PATIENCE

    def log_message(self, *words):
        """Says nothing."""

    def do_GET(self):
        nonce = secrets.token_urlsafe(16)
        try:
            self.check(dict(parse_qsl(urlsplit(self.path).query)).get("token", ""))
            if urlsplit(self.path).path != "/":
                raise Refused(404, "there is one page, at /")
        except Refused as err:
            return self.reply(err.args[0], err.args[1].encode(), "text/plain; charset=utf-8")
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        self.reply(200, page.encode(), "text/html; charset=utf-8",
                   {"Content-Security-Policy": POLICY.format(nonce)})

    def do_POST(self):
        try:
            self.check(self.headers.get("X-Token", ""))
            body, kind, *more = self.answer()
            self.reply(200, body, kind, *more)
        except Exception as err:        # each of them is told to the page, by line_of
            status = (err.args[0] if isinstance(err, Refused) else 409 if isinstance(err, Stopped)
                      else 400 if isinstance(err, (ValueError, OSError)) else 500)
            line = err.args[1] if isinstance(err, Refused) else line_of(err)
            self.reply(status, json.dumps({"error": line}).encode(), "application/json")

    def check(self, token):
        """Raises Refused unless the request comes from this server's own page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.rpartition(":")[0] not in self.server.hosts:
            raise Refused(403, f"this server is not {host[:80]!r}")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, f"pages of {origin[:80]!r} are not answered")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "the address lacks its token: open the address that view.py printed")

    def answer(self):
        """(bytes, type, headers or nothing) of a request. Raises Refused, and what Studio does."""
        studio, parts = self.server.studio, urlsplit(self.path)
        name, size = parts.path[1:], self.headers.get("Content-Length", "")
        most = photos.MOST_BYTES if name == "photo" else MOST_JSON
        if name not in REQUESTS:
            raise Refused(404, f"nothing is called {name[:40]!r}")
        if not size.isascii() or not size.isdecimal() or int(size) > most:
            raise Refused(413, f"{size or 'unknown'} bytes are too many, at most {most:,} can be "
                               "sent: make it smaller first")
        data = self.rfile.read(int(size))
        if len(data) < int(size):
            raise Refused(400, "the request ended too soon")
        if name != "open" and self.headers.get("X-Session") != studio.session:
            raise Refused(410, "another tab has taken over")
        if studio.subject is None and name not in WITHOUT_PHOTO:
            raise Refused(400, "there is no photo yet: drop one into the page")
        asked = {**dict(parse_qsl(parts.query)), "data": data} if name == "photo" else parsed(data)
        found = getattr(studio, name)(asked)
        if isinstance(found, tuple):
            return found
        return json.dumps(found).encode(), "application/json"

    def reply(self, status, body, kind, headers=None):
        """Sends it; whoever has gone away meanwhile misses it."""
        self.close_connection = self.close_connection or status >= 400      # of unread bytes
        try:
            self.send_response(status)
            for name, value in {
                    **(headers or {}), "Content-Type": kind, "Content-Length": str(len(body)),
                    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
                    "X-Content-Type-Options": "nosniff"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True


def parsed(data):
    """The dict of a JSON text. Raises ValueError."""
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise ValueError("the request is no JSON") from err
    if not isinstance(asked, dict):
        raise ValueError("the request is no JSON object")
    return asked


class Server(ThreadingHTTPServer):
    """Serves a Studio's page at `address`, which has the token that it asks for."""
    daemon_threads = True

    def __init__(self, studio, host, port):
        super().__init__((host, port), Handler)
        self.studio, self.token = studio, secrets.token_urlsafe(16)
        self.hosts = {*LOOPBACK, host}
        self.address = f"http://{host}:{self.server_port}/?token={self.token}"

    def handle_error(self, request, address):
        """A connection that broke ends alone, without a word."""
