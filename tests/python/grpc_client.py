"""Stubs generated from proto/ against a running router. usage: grpc_client.py HOST:PORT DEMO_MODEL_DIR

Over TLS where there is a key in OPENAI_API_KEY; the authority is in SSL_CERT_FILE then.
"""

import json
import os
import pathlib
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from muster.v1 import inference_pb2 as pb
from muster.v1 import inference_pb2_grpc

address, model_dir = sys.argv[1], pathlib.Path(sys.argv[2])
golden = json.loads((model_dir / "golden.json").read_text())
if "OPENAI_API_KEY" in os.environ:
    authority = pathlib.Path(os.environ["SSL_CERT_FILE"]).read_bytes()
    key = grpc.access_token_call_credentials(os.environ["OPENAI_API_KEY"])
    credentials = grpc.composite_channel_credentials(grpc.ssl_channel_credentials(authority), key)
    channel = grpc.secure_channel(address, credentials)
else:
    channel = grpc.insecure_channel(address)
stub = inference_pb2_grpc.InferenceStub(channel)

for service in ("", "muster.v1.Inference"):
    status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
    assert status == health_pb2.HealthCheckResponse.SERVING, (service, status)

model = stub.GetModel(pb.GetModelRequest(), timeout=10)
assert (model.name, model.experts_per_layer, model.experts_per_token) == ("demo", 8, 2), model

for case in golden["prompts"]:
    request = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=case["prompt_ids"]), max_tokens=40, stop=pb.Stop(ignore_eos=True)
    )
    events = list(stub.Generate(request, timeout=60))
    assert events[0].WhichOneof("event") == "started"
    assert events[-1].WhichOneof("event") == "finished"
    tokens = [event.token for event in events[1:-1]]
    assert [token.index for token in tokens] == list(range(40))
    assert [token.token_id for token in tokens] == case["ids"], case["name"]
    assert events[-1].finished.reason == pb.Finished.REASON_LENGTH

text = "Hello, world"
ids = stub.Tokenize(pb.TokenizeRequest(text=text, without_special=True), timeout=10).ids
assert stub.Detokenize(pb.DetokenizeRequest(ids=ids), timeout=10).text == text

stream = stub.Generate(pb.GenerateRequest(text="Once", max_tokens=400, stop=pb.Stop(ignore_eos=True)), timeout=60)
next(stream)
stream.cancel()

for bad, code in [
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x", model="other"), grpc.StatusCode.NOT_FOUND),
]:
    try:
        list(stub.Generate(bad, timeout=10))
    except grpc.RpcError as error:
        assert error.code() == code, error
    else:
        raise AssertionError(f"{bad} was accepted")
print("ok")
