#!/usr/bin/env python3
"""What floods cost a router and the clients that share it with them.

Sends floods of HTTP/2 frames to its gRPC address and bodies that stall to its HTTP address, one kind after another,
while one client asks for completions, and prints that client's p50 and p99 and the router's memory. Standard library only.

    flood.py --grpc 127.0.0.1:50051 --http 127.0.0.1:8080 --pid PID [--seconds 10] [KIND...]
"""

import argparse
import http.client
import json
import multiprocessing
import socket
import time

METHOD = "/muster.v1.Inference/Generate"
OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(text):
    return bytes([len(text)]) + text.encode()


def call(stream):
    block = b"\x83\x86\x04" + literal(METHOD) + b"\x01" + literal("x") + b"\x0f\x10" + literal("application/grpc")
    return frame(1, 4, stream, block)


def reset(stream):
    return frame(3, 0, stream, (8).to_bytes(4, "big"))


# What goes before, and the frames of one round.
KINDS = {
    "settings": (b"", lambda n: frame(4, 0, 0)),
    "ping": (b"", lambda n: frame(6, 0, 0, b"\7" * 8)),
    "ping answers": (b"", lambda n: frame(6, 1, 0, b"\7" * 8)),
    "window updates": (b"", lambda n: frame(8, 0, 0, (1).to_bytes(4, "big"))),
    "priority": (b"", lambda n: frame(2, 0, 1, bytes([0, 0, 0, 0, 1]))),
    "refused streams": (b"", lambda n: call(2 * n + 1)),
    "rapid reset": (b"", lambda n: call(2 * n + 1) + reset(2 * n + 1)),
    "empty data": (call(1), lambda n: frame(0, 0, 1)),
}


def split(address):
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def flood_frames(address, kind, until, connections, rounds):
    before, one = KINDS[kind]
    # Prepared, so that this process is not what is measured.
    chunks = [b"".join(one(n) for n in range(base, base + 500)) for base in range(0, 10000, 500)]
    while time.time() < until:
        try:
            with socket.create_connection(split(address), timeout=1) as peer:
                connections.value += 1
                peer.sendall(OPENING + before)
                peer.settimeout(0.2)
                for number in range(1 << 30):
                    peer.sendall(chunks[number % len(chunks)])
                    rounds.value += 500
                    peer.setblocking(False)
                    try:
                        while peer.recv(1 << 16):
                            pass
                        break
                    except BlockingIOError:
                        pass
                    finally:
                        peer.settimeout(0.2)
                    if time.time() >= until:
                        break
        except OSError:
            pass


def flood_bodies(address, until, connections, rounds):
    """Forty peers that each promise a large body and stall after 100 KiB; who is turned away comes again."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
    )
    peers = []
    while time.time() < until:
        while len(peers) < 40:
            peer = socket.create_connection(split(address), timeout=1)
            connections.value += 1
            peer.sendall(head + b" " * (100 << 10))
            peer.setblocking(False)
            peers.append(peer)
        time.sleep(0.1)
        left = []
        for peer in peers:
            try:
                peer.recv(1 << 12)
                peer.close()
                rounds.value += 1
            except BlockingIOError:
                left.append(peer)
            except OSError:
                peer.close()
        peers = left


def ask(address, body, timeout):
    """Seconds that a completion took, from connecting to its end; None where it failed."""
    start = time.perf_counter()
    try:
        connection = http.client.HTTPConnection(*split(address), timeout=timeout)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return time.perf_counter() - start if answer.status == 200 else None
    except OSError:
        return None


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def measure(arguments, body, flood=None, name="quiet"):
    before, until = resident(arguments.pid), time.time() + arguments.seconds
    connections, rounds = multiprocessing.Value("q", 0), multiprocessing.Value("q", 0)
    running = None
    if flood:
        running = multiprocessing.Process(target=flood[0], args=(*flood[1:], until, connections, rounds))
        running.start()
    took, failed, most = [], 0, before
    while time.time() < until:
        seconds = ask(arguments.http, body, timeout=10)
        failed += seconds is None
        took += [] if seconds is None else [seconds]
        most = max(most, resident(arguments.pid))
    if running:
        running.join()
    took.sort()
    quantile = (lambda q: f"{took[min(len(took) - 1, int(q * len(took)))] * 1000:.1f} ms") if took else lambda q: "-"
    print(
        f"| {name} | {connections.value} | {rounds.value} | {len(took)} | {failed} | {quantile(0.5)} | {quantile(0.99)}"
        f" | {most - before:+.1f} MiB |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grpc", required=True)
    parser.add_argument("--http", required=True)
    parser.add_argument("--pid", type=int, required=True, help="the router's process")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("kinds", nargs="*", help="all of them, unless named")
    arguments = parser.parse_args()
    small = json.dumps({"prompt": [1, 844, 624], "max_tokens": 4, "temperature": 0})
    large = small[:-1] + " " * (200 << 10) + "}"
    kinds = arguments.kinds or [*KINDS, "stalled bodies"]
    print("| flood | connections | rounds | answers | failed | p50 | p99 | memory |\n|---|---|---|---|---|---|---|---|")
    measure(arguments, small)
    for kind in kinds:
        if kind in KINDS:
            measure(arguments, small, (flood_frames, arguments.grpc, kind), kind)
    if "stalled bodies" in kinds:
        measure(arguments, large, name="quiet, large bodies")
        measure(arguments, large, (flood_bodies, arguments.http), "stalled bodies")


if __name__ == "__main__":
    main()
