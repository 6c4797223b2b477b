"""The part of the S3 protocol that an object store client needs, in memory: put (in parts too), get, head, list."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Server(ThreadingHTTPServer):
    """objects: content by key, bucket included. refuses: answer everything as to a client without permission."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.refuses = False

    @property
    def environment(self) -> dict[str, str]:
        """What a client wants to know."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        credentials = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "here"}
        return {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true"} | credentials


@contextmanager
def s3_server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query, keep_blank_values=True).items()}

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.server.refuses:
            status, body, headers = 403, b"<Error><Code>AccessDenied</Code></Error>", {}
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body)), "ETag": '"0"', "Last-Modified": "Wed, 25 Nov 2026 00:00:00 GMT"}
            | headers
        ).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        content, query = self.body(), self.query
        if "partNumber" in query:
            self.server.parts[query["uploadId"]][int(query["partNumber"])] = content
        else:
            self.server.objects[self.key] = content
        self.answer(200)

    def do_POST(self) -> None:
        query = self.query
        self.body()
        if "uploads" in query:
            self.server.parts[self.key] = {}
            self.answer(200, f"<R><UploadId>{escape(self.key)}</UploadId></R>".encode())
        else:
            parts = self.server.parts.pop(query["uploadId"])
            self.server.objects[self.key] = b"".join(parts[number] for number in sorted(parts))
            self.answer(200, b"<CompleteMultipartUploadResult><ETag>0</ETag></CompleteMultipartUploadResult>")

    def do_GET(self) -> None:
        if "list-type" in self.query:
            return self.answer(200, self.listing())
        content = self.server.objects.get(self.key)
        if content is None:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content)
        start = int(wanted[1]) if wanted[1] else len(content) - int(wanted[2])
        end = min(int(wanted[2]) + 1, len(content)) if wanted[1] and wanted[2] else len(content)
        self.answer(206, content[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(content)}")

    do_HEAD = do_GET

    def listing(self) -> bytes:
        bucket, prefix, delimiter = self.key.strip("/"), self.query.get("prefix", ""), self.query.get("delimiter", "")
        keys = sorted(
            key.removeprefix(f"{bucket}/") for key in self.server.objects if key.startswith(f"{bucket}/{prefix}")
        )
        inside = {key for key in keys if not (delimiter and delimiter in key[len(prefix) :])}
        folders = {prefix + key[len(prefix) :].split(delimiter)[0] + delimiter for key in keys if key not in inside}
        lines = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[f'{bucket}/{key}'])}</Size><ETag>0</ETag>"
            "<LastModified>2026-11-25T00:00:00.000Z</LastModified></Contents>"
            for key in sorted(inside)
        ]
        lines += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(lines)}</ListBucketResult>".encode()
