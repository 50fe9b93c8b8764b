"""Write a small Llama with random weights as GGUF: argv PATH. It says nonsense, but really says it.

Every byte is a token, so that any prompt can be read; what is not ASCII is never said.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

WIDTH, LAYERS, HEADS, FORWARD, CONTEXT = 64, 2, 4, 128, 4_096
SPECIAL = ["<|end|>", "<|from|>"]
CHAT = (
    "{% for m in messages %}<|from|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|from|>assistant: {% endif %}"
)


def byte_letters() -> list[str]:
    """A printable letter for each byte, as byte-level BPE vocabularies have them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def main() -> None:
    letters = byte_letters()
    merged = letters[ord("t")] + letters[ord("h")]  # a vocabulary without any is not accepted
    tokens = [*SPECIAL, *letters, merged]
    random = np.random.default_rng(7)

    def weights(*shape: int, size: float = 0.2) -> np.ndarray:
        return (random.standard_normal(shape) * size).astype(np.float32)

    said = weights(len(tokens), WIDTH)
    said[len(SPECIAL) + 127 : -1] = 0  # as likely as not, beside tokens that are likelier

    out = gguf.GGUFWriter(sys.argv[1], "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FORWARD)
    out.add_head_count(HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(tokens))
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    control = [gguf.TokenType.CONTROL] * len(SPECIAL)
    out.add_token_types([*control, *[gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))])
    out.add_token_merges(["t h"])
    out.add_eos_token_id(0)
    out.add_bos_token_id(0)
    out.add_add_bos_token(False)
    out.add_chat_template(CHAT)
    out.add_tensor("token_embd.weight", weights(len(tokens), WIDTH))
    out.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    out.add_tensor("output.weight", said)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for square in ("attn_q", "attn_k", "attn_v", "attn_output"):
            out.add_tensor(f"blk.{layer}.{square}.weight", weights(WIDTH, WIDTH))
        for wide in ("ffn_gate", "ffn_up"):
            out.add_tensor(f"blk.{layer}.{wide}.weight", weights(FORWARD, WIDTH))
        out.add_tensor(f"blk.{layer}.ffn_down.weight", weights(WIDTH, FORWARD))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
