//! Decoder language models on packed token rows: Hugging Face checkpoints in and out, generation with a KV cache.
