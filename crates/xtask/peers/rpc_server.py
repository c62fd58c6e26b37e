"""A llama.cpp RPC server with one CPU device: rpc_server.py HOST:PORT THREADS. Ends with its standard input."""

import ctypes
import os
import sys
import threading

import llama_cpp


def library(name):
    return ctypes.CDLL(os.path.join(os.path.dirname(llama_cpp.__file__), "lib", name))


def main():
    endpoint, threads = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    llama_cpp.llama_backend_init()
    ggml = library("libggml.so")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    cpu = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(cpu))
    start = library("libggml-rpc.so").ggml_backend_rpc_start_server
    start.restype = None
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    start(endpoint.encode(), None, threads, 1, devices)
    sys.exit("the RPC server ended")


main()
