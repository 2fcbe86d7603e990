"""A server that answers every request at once with the same text: what is left is our client.

    python -m benchmarks.servers.instant 31700 &
    python -m benchmarks.generation --url http://127.0.0.1:31700 --model instant --fixed \\
        --documents 256 --generations 32 --words 120 --concurrency 256
"""

import asyncio
import json
import sys

WORDS = 160  # of an answer: about 800 characters
ANSWER = {
    "choices": [{"message": {"content": "word " * WORDS}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1000, "completion_tokens": WORDS},
}
PAGES = {
    b"POST /v1/chat/completions": ANSWER,
    b"POST /tokenize": {"tokens": [1] * 1000},
    b"GET /v1/models": {"data": [{"id": "instant"}]},
}


def response(content: object) -> bytes:
    body = json.dumps(content).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
    return head + str(len(body)).encode() + b"\r\n\r\n" + body


RESPONSES = {page: response(content) for page, content in PAGES.items()}
EMPTY = response({})


class Instant(asyncio.Protocol):
    """As little HTTP as the client needs: aiohttp's own server costs more than the client."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end]
            length = 0
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            self.transport.write(RESPONSES.get(head.split(b" HTTP/")[0], EMPTY))


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
