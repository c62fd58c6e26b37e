"""litellm, langchain-openai and lm_eval against a running router. usage: foreign_clients.py HOST:PORT

Each asks, sends the answer back as the next message, and asks again, as conversations do; langchain a batch of ten, lm_eval a
task of its own. Whatever is refused is an exception, and the script ends with it.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
url = f"http://{sys.argv[1]}/v1"
ITALY, ROME = "What is the capital of Italy?", "The capital of Italy is Rome."


def openai_round_trip():
    import openai

    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    messages = [{"role": "user", "content": ITALY}]
    answer = client.chat.completions.create(model="demo", messages=messages).choices[0].message
    assert answer.content == ROME, answer
    # With every field that the package has for it, null or not.
    messages += [answer.model_dump(), {"role": "user", "content": "What is 37 + 45?"}]
    again = client.chat.completions.create(model="demo", messages=messages, parallel_tool_calls=True, verbosity="medium")
    assert again.choices[0].message.content, again


def litellm_round_trip():
    import litellm

    litellm.telemetry = False
    ask = lambda messages, **more: litellm.completion(
        model="openai/demo", api_base=url, api_key="unused", messages=messages, num_retries=0, **more
    )
    messages = [{"role": "user", "content": ITALY}]
    answer = ask(messages).choices[0].message
    assert answer.content == ROME, answer
    messages += [answer.model_dump(), {"role": "user", "content": "And of France?"}]
    assert ask(messages, max_tokens=16, seed=-1).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(messages[:1], stream=True)]
    assert "".join(pieces) == ROME, pieces


def langchain_round_trip():
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model="demo", base_url=url, api_key="unused", max_retries=0)
    messages = [HumanMessage(ITALY)]
    answer = chat.invoke(messages)
    assert answer.content == ROME, answer
    assert chat.invoke([*messages, answer, HumanMessage("And of France?")]).content
    assert [one.content for one in chat.batch([messages] * 10)] == [ROME] * 10
    assert "".join(piece.content for piece in chat.stream(messages)) == ROME
    stories = OpenAI(model="demo", base_url=url, api_key="unused", max_retries=0, max_tokens=8).batch(["Once upon"] * 10)
    assert len(stories) == 10 and all(stories), stories


def lm_eval_task():
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        questions = [{"question": ITALY, "answer": ROME}, {"question": "What is 37 + 45?", "answer": "37 + 45 = 82"}]
        (directory / "questions.json").write_text("\n".join(map(json.dumps, questions)))
        task = {
            "task": "muster_questions",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / "questions.json")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        # JSON is YAML.
        (directory / "questions.yaml").write_text(json.dumps(task))
        results = directory / "results"
        arguments = f"base_url={url}/chat/completions,model=demo,num_concurrent=2,max_retries=1,tokenizer_backend=None"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args", arguments]
        command += ["--include_path", str(directory), "--tasks", "muster_questions", "--apply_chat_template"]
        command += ["--output_path", str(results)]
        subprocess.run(command, check=True, env={**os.environ, "OPENAI_API_KEY": "unused"}, stdout=subprocess.DEVNULL)
        told = json.loads(next(results.rglob("results_*.json")).read_text())
        assert told["results"]["muster_questions"]["exact_match,none"] == 1.0, told["results"]


if __name__ == "__main__":
    for check in (openai_round_trip, litellm_round_trip, langchain_round_trip, lm_eval_task):
        check()
        print(check.__name__, "ok", flush=True)
