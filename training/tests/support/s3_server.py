"""A real S3 server on this machine, and the faults that it answers with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

BUCKET = "bucket"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEEXAMPLE00",
    "AWS_SECRET_ACCESS_KEY": "a-secret-key-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
SLOW_DOWN = (
    "503 Slow Down",
    b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>",
)
EXPIRED = (
    "400 Bad Request",
    b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
)
Answer = tuple[str, bytes]


@dataclass
class S3Server:
    """The server's address, what it was asked, and how to have it fail."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path, in order
    answered: list[tuple[str, str]] = field(default_factory=list)  # those of them without a fault
    fault: Callable[[str, str, int], Answer | None] = lambda *_: None

    def clear(self) -> None:
        """Forget what was asked."""
        self.requests.clear()
        self.answered.clear()

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables by which a client finds the server."""
        return KEYS | {"AWS_ENDPOINT_URL": self.url}

    def written(self) -> list[str]:
        """Return the names of the objects that were written, in order."""
        start = f"/{BUCKET}/"
        return [path[len(start) :] for method, path in [*self.answered] if method == "PUT"]


@contextlib.contextmanager
def serving() -> Iterator[S3Server]:
    """Serve S3 with one empty bucket."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            """Print nothing."""

    application = DomainDispatcherApplication(create_backend_app)
    server = S3Server("")

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        server.requests.append((method, path))
        faulty = server.fault(method, path, len(server.requests))
        if faulty is None:
            content = application(environ, start)
            server.answered.append((method, path))
            return content
        status, body = faulty
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    httpd = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=server.url,
            region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        server.clear()
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
