"""Measures transformers in bf16: prints one line of JSON with tokens per second and the seconds to load.

Only the model's forward is timed, with random tokens and logits of the last position. The implementations of the
experts are tried, and each figure is that of the fastest.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

# Not batched_mm: it copies the experts' weights for every token, 12 GB for 512 of them, and is slower at every length.
EXPERTS = ["eager", "grouped_mm"]


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill", type=int, default=0, help="tokens of the prompt; 0 leaves it out")
    parser.add_argument("--decode", default="", help="sequences at a time, separated by commas")
    parser.add_argument("--prompt", type=int, required=True, help="tokens before decoding")
    parser.add_argument("--steps", type=int, required=True, help="steps of decoding")
    parser.add_argument("--repeats", type=int, required=True)
    return parser.parse_args()


def random_tokens(model, count, tokens):
    return torch.randint(model.config.vocab_size, (count, tokens))


def prefill(model, tokens):
    ids = random_tokens(model, 1, tokens)
    started = time.perf_counter()
    model(ids, use_cache=True, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    return tokens / (time.perf_counter() - started)


def decode(model, count, before, steps):
    cache = DynamicCache(config=model.config)
    model(random_tokens(model, count, before), use_cache=True, past_key_values=cache, logits_to_keep=1)
    tokens = random_tokens(model, count, steps)
    started = time.perf_counter()
    for step in range(steps):
        model(tokens[:, step : step + 1], use_cache=True, past_key_values=cache, logits_to_keep=1)
    return count * steps / (time.perf_counter() - started)


def fastest(model, measure, repeats, failures):
    """The best median of all implementations, and whose it is."""
    medians = {}
    for name in EXPERTS:
        try:
            model.set_experts_implementation(name)
            measure()
            medians[name] = statistics.median(measure() for _ in range(repeats))
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:200]
    if not medians:
        sys.exit(f"no implementation of the experts runs: {failures}")
    best = max(medians, key=medians.get)
    return medians[best], best


def main():
    asked = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.set_verbosity_error()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16).eval()
    figures, chosen, failures = {"load_seconds": time.perf_counter() - started}, {}, {}
    with torch.inference_mode():
        if asked.prefill:
            figures["prefill"], chosen["prefill"] = fastest(
                model, lambda: prefill(model, asked.prefill), asked.repeats, failures
            )
        for count in [int(text) for text in asked.decode.split(",") if text]:
            name = f"decode-{count}"
            figures[name], chosen[name] = fastest(
                model, lambda: decode(model, count, asked.prompt, asked.steps), asked.repeats, failures
            )
    note = f"transformers {transformers.__version__}, torch {torch.__version__}, experts {chosen}"
    if failures:
        note += f"; did not run: {failures}"
    print(json.dumps({"figures": figures, "note": note}), flush=True)


main()
