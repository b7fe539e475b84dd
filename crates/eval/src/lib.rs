//! Samples from language models and measures them on held-out preference pairs.
