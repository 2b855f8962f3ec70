"""Writes a DeepSeek-V2 model folder as GGUF for llama.cpp, with the latent's up-projection split as absorption wants it."""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file


def convert(folder, out, dtype):
    config = json.loads((folder / "config.json").read_text())
    if config.get("n_group", 1) > 1 or config.get("rope_scaling"):
        raise SystemExit(f"{folder}: expert groups and scaled rotations are not written here")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))

    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, value = config["kv_lora_rank"], config["v_head_dim"]
    writer = gguf.GGUFWriter(out, "deepseek2")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    # Absorbed, attention has one key of latent and rotated part for all heads.
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_q_lora_rank(config["q_lora_rank"] or 0)
    writer.add_kv_lora_rank(latent)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_BF16)

    def add(name, tensor):
        # Vectors and routers stay in f32, as llama.cpp wants them.
        data = tensor.float().contiguous().numpy()
        if dtype == "f32" or tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            return writer.add_tensor(name, data)
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)

    plain = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
    }
    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    add("output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        below = f"model.layers.{layer}."
        for theirs, ours in plain.items():
            if (tensor := tensors.get(f"{below}{theirs}.weight")) is not None:
                add(f"blk.{layer}.{ours}.weight", tensor)
        keys_values = tensors[f"{below}self_attn.kv_b_proj.weight"].view(heads, nope + value, latent)
        add(f"blk.{layer}.attn_k_b.weight", keys_values[:, :nope].transpose(1, 2))
        add(f"blk.{layer}.attn_v_b.weight", keys_values[:, nope:])
        for part in ("gate", "up", "down"):
            experts = [tensors.get(f"{below}mlp.experts.{e}.{part}_proj.weight") for e in range(config["n_routed_experts"])]
            if experts[0] is not None:
                add(f"blk.{layer}.ffn_{part}_exps.weight", torch.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["f32", "bf16"], required=True)
    convert(**vars(parser.parse_args()))
