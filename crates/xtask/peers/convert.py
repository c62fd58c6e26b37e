"""Writes a granitemoe checkpoint as GGUF: convert.py MODEL_DIR OUT_DIR makes bf16.gguf, q8_0.gguf and q4_k_m.gguf.

Only what the bench model needs is here: one family, a byte-level BPE tokenizer, tied embeddings. Files that exist are left
as they are.
"""

import json
import os
import sys

import gguf
import numpy as np
from safetensors import safe_open


def metadata(writer, config):
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def vocabulary(writer, tokenizer, size):
    words = [f"[unused{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for word, number in tokenizer["model"]["vocab"].items():
        words[number], kinds[number] = word, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        words[token["id"]], kinds[token["id"]] = token["content"], gguf.TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def interleave(rows, heads):
    """RoPE pairs neighbours in GGUF's layout of this family, halves in the checkpoint's."""
    width = rows.shape[0] // heads
    return np.ascontiguousarray(
        rows.reshape(heads, 2, width // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    )


def tensors(config, read):
    yield "token_embd.weight", read("model.embed_tokens.weight")
    yield "output_norm.weight", read("model.norm.weight")
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        attention, experts = source + "self_attn.", source + "block_sparse_moe."
        yield target + "attn_norm.weight", read(source + "input_layernorm.weight")
        yield target + "ffn_norm.weight", read(source + "post_attention_layernorm.weight")
        yield target + "attn_q.weight", interleave(read(attention + "q_proj.weight"), config["num_attention_heads"])
        yield target + "attn_k.weight", interleave(read(attention + "k_proj.weight"), config["num_key_value_heads"])
        yield target + "attn_v.weight", read(attention + "v_proj.weight")
        yield target + "attn_output.weight", read(attention + "o_proj.weight")
        yield target + "ffn_gate_inp.weight", read(experts + "router.layer.weight")
        gate, up = np.split(read(experts + "input_linear.weight"), 2, axis=1)
        yield target + "ffn_gate_exps.weight", np.ascontiguousarray(gate)
        yield target + "ffn_up_exps.weight", np.ascontiguousarray(up)
        yield target + "ffn_down_exps.weight", read(experts + "output_linear.weight")


def bf16(model_dir, path):
    with open(os.path.join(model_dir, "config.json")) as file:
        config = json.load(file)
    with open(os.path.join(model_dir, "tokenizer.json")) as file:
        tokenizer = json.load(file)
    if config["model_type"] != "granitemoe" or not config["tie_word_embeddings"]:
        sys.exit("only granitemoe with tied embeddings can be converted")
    writer = gguf.GGUFWriter(path, "granitemoe")
    metadata(writer, config)
    vocabulary(writer, tokenizer, config["vocab_size"])
    with safe_open(os.path.join(model_dir, "model.safetensors"), framework="pt") as checkpoint:
        import torch

        def read(name):
            return checkpoint.get_tensor(name).view(torch.uint16).numpy()

        for name, bits in tensors(config, read):
            # Vectors and gates stay f32, as in the reference converter.
            if bits.ndim == 1 or "ffn_gate_inp" in name:
                writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
            else:
                writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def quantise(source, target, kind):
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = kind
    settings.nthread = 2
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings) != 0:
        sys.exit(f"llama.cpp could not write {target}")


def main():
    model_dir, out_dir = sys.argv[1:]
    os.makedirs(out_dir, exist_ok=True)
    import llama_cpp

    def path(name):
        return os.path.join(out_dir, name)

    def once(name, make):
        """Only whole files get their final name."""
        if not os.path.exists(path(name)):
            make(path(name + ".part"))
            os.replace(path(name + ".part"), path(name))

    once("bf16.gguf", lambda part: bf16(model_dir, part))
    once("q8_0.gguf", lambda part: quantise(path("bf16.gguf"), part, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0))
    once("q4_k_m.gguf", lambda part: quantise(path("bf16.gguf"), part, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M))


main()
