"""Measures llama.cpp: prints one line of JSON with tokens per second and the seconds to load.

No sampling and no text: only llama_decode is timed. Tokens are random, so that every step asks for its own experts.
"""

import argparse
import ctypes
import json
import os
import random
import subprocess
import socket
import statistics
import sys
import time

import llama_cpp


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill", type=int, default=0, help="tokens of the prompt; 0 leaves it out")
    parser.add_argument("--decode", default="", help="sequences at a time, separated by commas")
    parser.add_argument("--prompt", type=int, required=True, help="tokens before decoding")
    parser.add_argument("--steps", type=int, required=True, help="steps of decoding")
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--rpc", type=int, default=0, help="RPC servers to put the layers on, one thread each")
    return parser.parse_args()


def quiet(level, text, _):
    if level >= 4:
        sys.stderr.buffer.write(text)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rpc_devices(count):
    """Starts the servers; returns their processes and a NULL-terminated list of devices."""
    folder = os.path.dirname(llama_cpp.__file__)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rpc_server.py")
    ggml = ctypes.CDLL(os.path.join(folder, "lib", "libggml.so"))
    base = ctypes.CDLL(os.path.join(folder, "lib", "libggml-base.so"))
    rpc = ctypes.CDLL(os.path.join(folder, "lib", "libggml-rpc.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_register.restype = None
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    servers, devices = [], []
    for _ in range(count):
        port = free_port()
        server = subprocess.Popen(
            [sys.executable, script, f"127.0.0.1:{port}", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        servers.append(server)
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit("an RPC server ended at once")
                time.sleep(0.1)
        else:
            sys.exit("an RPC server did not start listening")
        registry = rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())
        if not registry:
            sys.exit("llama.cpp did not accept its own RPC server")
        ggml.ggml_backend_register(registry)
        devices.append(base.ggml_backend_reg_dev_get(registry, 0))
    return servers, (ctypes.c_void_p * (count + 1))(*devices, None)


class Context:
    def __init__(self, model, threads, sequences, per_sequence):
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * per_sequence
        settings.n_batch = settings.n_ubatch = max(512, sequences)
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            sys.exit("llama.cpp could not make a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def decode(self, entries):
        """One llama_decode of (token, position, sequence, wants logits)."""
        self.batch.n_tokens = len(entries)
        for slot, (token, position, sequence, logits) in enumerate(entries):
            self.batch.token[slot] = token
            self.batch.pos[slot] = position
            self.batch.n_seq_id[slot] = 1
            self.batch.seq_id[slot][0] = sequence
            self.batch.logits[slot] = logits
        started = time.perf_counter()
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            sys.exit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - started

    def clear(self):
        llama_cpp.llama_memory_clear(self.memory, True)

    def free(self):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


def prompt(rng, vocabulary, tokens, sequence):
    return [(rng.randrange(vocabulary), at, sequence, at + 1 == tokens) for at in range(tokens)]


def main():
    asked = arguments()
    rng = random.Random(0)
    log = llama_cpp.llama_log_callback(quiet)
    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    servers = []
    if asked.rpc:
        servers, devices = rpc_devices(asked.rpc)
        settings.devices = ctypes.cast(devices, ctypes.c_void_p)
        settings.n_gpu_layers = 999
    started = time.perf_counter()
    model = llama_cpp.llama_model_load_from_file(asked.model.encode(), settings)
    if not model:
        sys.exit("llama.cpp could not load the model")
    figures = {"load_seconds": time.perf_counter() - started}
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    if asked.prefill:
        context = Context(model, asked.threads, 1, asked.prefill + 8)
        times = []
        for _ in range(asked.repeats + 1):
            context.clear()
            times.append(context.decode(prompt(rng, vocabulary, asked.prefill, 0)))
        context.free()
        figures["prefill"] = asked.prefill / statistics.median(times[1:])
    for count in [int(text) for text in asked.decode.split(",") if text]:
        context = Context(model, asked.threads, count, asked.prompt + asked.steps * asked.repeats + 8)
        for sequence in range(count):
            context.decode(prompt(rng, vocabulary, asked.prompt, sequence))
        rates, position = [], asked.prompt

        def step():
            return context.decode([(rng.randrange(vocabulary), position, s, True) for s in range(count)])

        step()
        position += 1
        for _ in range(asked.repeats):
            spent = 0.0
            for _ in range(asked.steps):
                spent += step()
                position += 1
            rates.append(count * asked.steps / spent)
        context.free()
        figures[f"decode-{count}"] = statistics.median(rates)
    llama_cpp.llama_model_free(model)
    info = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"figures": figures, "note": f"llama-cpp-python {llama_cpp.__version__}", "system": info}), flush=True)
    for server in servers:
        server.kill()


main()
