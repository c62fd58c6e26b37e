"""What large bodies cost a router, and what a good client feels of them. usage: large_bodies.py MUSTER [--queue]

Starts `MUSTER up` on free ports and posts, first each body alone, then a hundred of a kind at once, over and over, while
a good client, a process of its own, asks for a few tokens. The crowd runs at idle priority. The last rows tell what it
alone costs the good client: the same bodies, posted to a listener that reads them and answers 400. Linux; nothing but Python's own library. With
--queue: eight times the requests that the batch holds, and how long the first token and a refusal take.
"""

import http.client
import json
import multiprocessing
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import threading
import time

CROWD = 100
GOOD = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


def completion(prompt):
    return "/v1/completions", json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 1}).encode()


def chat(messages, **more):
    return "/v1/chat/completions", json.dumps({"model": "demo", "messages": messages, "max_tokens": 1, **more}).encode()


def bodies():
    words = "Once upon a time there was a little girl, and she said: what a fine day! "
    message = {"role": "user", "content": "x" * 4000}
    tool = {"type": "function", "function": {"name": "f", "description": words * 100,
            "parameters": {"type": "object", "properties": {str(n): {"type": "string"} for n in range(150)}}}}
    return {
        "text of 4 MB": completion((words * 60_000)[: 4 << 20]),
        "one character, 4 MB": completion("a" * (4 << 20)),
        "text of 0.9 MB": completion((words * 60_000)[:900_000]),
        "one character, 0.9 MB": completion("a" * 900_000),
        "token ids, 8 MB": completion([7] * 2_700_000),
        "chat of 1000 messages, 4 MB": chat([message] * 1000),
        "chat of one message, 4 MB": chat([{"role": "user", "content": (words * 60_000)[: 4_100_000]}]),
        "128 tools, 1.6 MB": chat([{"role": "user", "content": "hi"}], tools=[tool] * 128),
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    def __init__(self, muster, *more):
        self.port, grpc = free_port(), free_port()
        args = [muster, "up", "--http", f"127.0.0.1:{self.port}", "--grpc", f"127.0.0.1:{grpc}", *more]
        self.process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while self.ask("/readyz", None)[0] != 200:
            assert self.process.poll() is None, "it ended"
            time.sleep(0.1)
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        is_router = lambda pid: b"router" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        self.router = next(pid for pid in children if is_router(pid))

    def ask(self, path, body, port=None):
        """Status and seconds; status 0 where the connection broke."""
        began, status = time.monotonic(), 0
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=120)
            headers = {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            status = response.status
            response.read()
            connection.close()
        except OSError:
            pass
        except http.client.HTTPException:
            pass
        return status, time.monotonic() - began

    def memory(self, key):
        lines = pathlib.Path(f"/proc/{self.router}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

    def peak(self, work):
        """What `work` gives, and by how many MiB memory grew at most."""
        pathlib.Path(f"/proc/{self.router}/clear_refs").write_text("5")
        before = self.memory("VmRSS")
        result = work()
        return result, self.memory("VmHWM") - before

    def good(self, count):
        times = []
        for _ in range(count):
            status, seconds = self.ask("/v1/completions", json.dumps(GOOD).encode())
            times.append(seconds if status == 200 else float("inf"))
        return times

    def stop(self):
        self.process.terminate()
        self.process.wait()


def p99(times):
    return sorted(times)[min(len(times) - 1, int(len(times) * 0.99))]


class Crowd(multiprocessing.Process):
    """A hundred threads that post one body over and over."""

    def __init__(self, cluster, path, body, port=None):
        super().__init__()
        self.cluster, self.path, self.body, self.port = cluster, path, body, port
        self.over, self.told = multiprocessing.Event(), multiprocessing.SimpleQueue()

    def run(self):
        # Its machines would be others: it has what this one has left.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        statuses, slowest, lock = {}, [0.0], threading.Lock()

        def fire():
            while not self.over.is_set():
                status, seconds = self.cluster.ask(self.path, self.body, self.port)
                with lock:
                    statuses[status] = statuses.get(status, 0) + 1
                    slowest[0] = max(slowest[0], seconds)
                if status in (0, 429, 503):
                    time.sleep(1)

        threads = [threading.Thread(target=fire) for _ in range(CROWD)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        self.told.put((statuses, slowest[0]))

    def result(self):
        self.over.set()
        told = self.told.get()
        self.join()
        return told


def under_fire(cluster, path, body, port=None):
    """Times of a good client, and the statuses of the crowd and the slowest of its answers."""
    crowd = Crowd(cluster, path, body, port)
    crowd.start()
    time.sleep(0.5)
    times = cluster.good(200)
    return times, *crowd.result()


class Sink(multiprocessing.Process):
    """Reads a request and its body, answers 400, ends the connection: the least that anybody could do."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]

    def run(self):
        buffer = bytearray(1 << 20)

        def serve(peer):
            head = b""
            while b"\r\n\r\n" not in head:
                head += peer.recv(4096)
            fields, rest = head.split(b"\r\n\r\n", 1)
            length = next(line for line in fields.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            left = int(length.split(b":")[1]) - len(rest)
            while left > 0:
                left -= peer.recv_into(buffer) or left
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            peer.close()

        while True:
            peer, _ = self.listener.accept()
            threading.Thread(target=serve, args=(peer,), daemon=True).start()


def told(statuses):
    return ", ".join(f"{status} x {count}" for status, count in sorted(statuses.items()))


def large(muster):
    cluster = Cluster(muster)
    cluster.good(20)
    quiet = cluster.good(300)
    print(f"good client, quiet: p50 {statistics.median(quiet) * 1e3:.0f} ms, p99 {p99(quiet) * 1e3:.0f} ms\n")
    print("| body | status | ms | MiB | a hundred at once: statuses | slowest, ms | MiB | good client p50, ms | p99, ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (path, body) in bodies().items():
        (status, seconds), grown = cluster.peak(lambda: cluster.ask(path, body))
        time.sleep(1)
        (times, statuses, slowest), crowd = cluster.peak(lambda: under_fire(cluster, path, body))
        print(f"| {name} | {status} | {seconds * 1e3:.0f} | {grown:.0f} | {told(statuses)} | {slowest * 1e3:.0f} | {crowd:.0f}"
              f" | {statistics.median(times) * 1e3:.0f} | {p99(times) * 1e3:.0f} |", flush=True)
        time.sleep(2)
    print("\n| crowd whose bodies go elsewhere | answers | good client p50, ms | p99, ms |\n|---|---|---|---|")
    sink = Sink()
    sink.start()
    for name, (path, body) in bodies().items():
        times, statuses, _ = under_fire(cluster, path, body, sink.port)
        print(f"| {name} | {told(statuses)} | {statistics.median(times) * 1e3:.0f} | {p99(times) * 1e3:.0f} |", flush=True)
    sink.terminate()
    cluster.stop()


def queue(muster):
    """Requests for 200 tokens, eight times as many at once as run, again and again for half a minute."""
    running = 256
    cluster = Cluster(muster)
    body = {**GOOD, "max_tokens": 200, "stream": True, "ignore_eos": True}
    first, refused, over = [], [], time.monotonic() + 30

    def stream():
        while time.monotonic() < over:
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=120)
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status == 200:
                response.readline()
                first.append(time.monotonic() - began)
            else:
                refused.append(time.monotonic() - began)
                time.sleep(1)
            response.read()
            connection.close()

    crowd = [threading.Thread(target=stream) for _ in range(8 * running)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    for what, times in (("first token", first), ("refusal", refused)):
        if times:
            print(f"{what}: {len(times)} times, p50 {statistics.median(times) * 1e3:.0f} ms, p99 {p99(times) * 1e3:.0f} ms,"
                  f" most {max(times) * 1e3:.0f} ms")
    cluster.stop()


if __name__ == "__main__":
    (queue if "--queue" in sys.argv else large)(sys.argv[1])
