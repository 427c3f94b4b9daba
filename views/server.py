"""The http server of view.py's page: who is answered, and how.

A request is POST /NAME of JSON (of a photo: its bytes, the rest in the address), answered by the
method of that name of a studio.Studio; an error is {"error": one line}.
"""

import hmac
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from views import photos
from views.render import Stopped
from views.studio import line_of

PAGE = Path(__file__).with_name("page.html")
REQUESTS = ("open", "photo", "choose", "picture", "view", "path", "film", "progress")
MOST_JSON = 2**20               # bytes of a request that is no photo
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
           "X-Content-Type-Options": "nosniff"}
POLICY = ("default-src 'none'; img-src blob: data:; media-src blob:; connect-src 'self'; "
          "script-src 'nonce-{0}'; style-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


class Refused(ValueError):
    """A request that is not answered: HTTP status, one line."""
    def __str__(self):
        return self.args[1]


class Handler(BaseHTTPRequestHandler):
    """A connection. Only pages that this server has served, to who knew its token, are answered."""
    protocol_version, timeout = "HTTP/1.1", 60.0        # seconds that a silent connection is kept
    log_message = staticmethod(lambda *words: None)

    def do_GET(self):
        """Answers a request of either kind; whoever has gone away meanwhile misses it."""
        url = urlsplit(self.path)
        name, query = url.path[1:], dict(parse_qsl(url.query))
        try:
            self.check(query.get("token") or self.headers.get("X-Token", ""))
            status, found = 200, self.answer(name, query) if name else self.page()
        except Exception as err:        # each of them is told to the page
            status, found = (err.args[0] if isinstance(err, Refused) else 409 if
                             isinstance(err, Stopped) else 400), {"error": line_of(err)}
        if isinstance(found, dict):
            found = json.dumps(found).encode(), "application/json", {}
        body, kind, headers = found
        self.close_connection = self.close_connection or status >= 400      # of unread bytes
        self.send_response(status)
        for header in {**HEADERS, **headers, "Content-Type": kind,
                       "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def check(self, token):
        """Raises Refused unless the request comes from this server's own page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.rpartition(":")[0] not in self.server.hosts:
            raise Refused(403, f"this server is not {host[:80]!r}")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, f"pages of {origin[:80]!r} are not answered")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "the address lacks its token: open the address that view.py printed")

    def page(self):
        """(bytes, type, headers) of the page, whose own script and style alone are run."""
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        return (text.encode(), "text/html; charset=utf-8",
                {"Content-Security-Policy": POLICY.format(nonce)})

    def answer(self, name, query):
        """What a Studio's method gives: a dict, or (bytes, type, headers). Raises Refused, and what
        the method does."""
        studio, size = self.server.studio, int(self.headers.get("Content-Length", -1))
        most = photos.MOST_BYTES if name == "photo" else MOST_JSON
        if name not in REQUESTS:
            raise Refused(404, f"nothing is called {name[:40]!r}")
        if not 0 <= size <= most:
            raise Refused(413, f"{size:,} bytes are too many, at most {most:,} can be sent: make "
                               "it smaller first")
        data = self.rfile.read(size)
        if name != "open" and self.headers.get("X-Session") != studio.session:
            raise Refused(410, "another tab has taken over")
        asked = {**query, "data": data} if name == "photo" else json.loads(data)
        return getattr(studio, name)(asked)


class Server(ThreadingHTTPServer):
    """Serves a Studio's page at `address`, which has the token that it asks for."""
    daemon_threads = True
    handle_error = staticmethod(lambda *connection: None)   # one that broke ends alone

    def __init__(self, studio, host, port):
        super().__init__((host, port), Handler)
        self.studio, self.token = studio, secrets.token_urlsafe(16)
        self.hosts = {"127.0.0.1", "localhost", "[::1]", host}
        self.address = f"http://{host}:{self.server_port}/?token={self.token}"
