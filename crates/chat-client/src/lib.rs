//! Client for OpenAI-compatible chat completions with a durable reply store, retries and bounded concurrency.
