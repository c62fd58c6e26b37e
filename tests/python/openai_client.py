"""The `openai` package against a running router. usage: openai_client.py HOST:PORT DEMO_MODEL_DIR

With https://HOST:PORT the key is in OPENAI_API_KEY and the authority in SSL_CERT_FILE.
"""

import json
import os
import pathlib
import sys

import openai

address, model_dir = sys.argv[1], pathlib.Path(sys.argv[2])
golden = json.loads((model_dir / "golden.json").read_text())
story = golden["prompts"][0]
url = address if "://" in address else f"http://{address}"
key = os.environ.get("OPENAI_API_KEY", "unused")
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

models = client.models.list().data
assert [m.id for m in models] == ["demo"], models

completion = client.completions.create(model="demo", prompt=story["prompt"], max_tokens=40, temperature=0)
assert completion.choices[0].text == story["text"], completion
assert completion.usage.completion_tokens == 40

pieces = client.completions.create(model="demo", prompt=story["prompt_ids"], max_tokens=40, temperature=0, stream=True)
assert "".join(chunk.choices[0].text for chunk in pieces if chunk.choices) == story["text"]

question = [{"role": "user", "content": "What is the capital of Italy?"}]
chat = client.chat.completions.create(
    model="demo", messages=question, temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2
)
answer = chat.choices[0].message.content
assert answer == "The capital of Italy is Rome.", answer
assert chat.choices[0].finish_reason == "stop"
assert all(len(token.top_logprobs) == 2 for token in chat.choices[0].logprobs.content)

streamed, usage = "", None
for chunk in client.chat.completions.create(
    model="demo", messages=question, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
):
    streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    usage = chunk.usage or usage
assert streamed == answer, streamed
assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

several = client.completions.create(model="demo", prompt="One day", max_tokens=8, n=3, seed=7, stop=["\n\n"])
assert [choice.index for choice in several.choices] == [0, 1, 2]
again = client.completions.create(model="demo", prompt="One day", max_tokens=8, n=3, seed=7, stop=["\n\n"])
assert [c.text for c in several.choices] == [c.text for c in again.choices]

for error, change in [
    (openai.BadRequestError, {"max_tokens": 0}),
    (openai.BadRequestError, {"temperature": -1}),
    (openai.NotFoundError, {"model": "gpt-4"}),
]:
    try:
        client.completions.create(**({"model": "demo", "prompt": "x", "max_tokens": 4} | change))
    except error as refused:
        assert refused.body["message"], refused
    else:
        raise AssertionError(f"{change} was accepted")
print("ok")
