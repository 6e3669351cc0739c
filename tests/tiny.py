"""The sizes of the tiny Llama that conftest.py traces."""

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 256, "max_position_embeddings": 128,
}  # fmt: skip
SEQ = 32
