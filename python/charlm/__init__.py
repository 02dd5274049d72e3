"""charlm: trains character-level language models with fused_lstm and samples from them."""
