//! Makes a new, untrained model directory: a byte-level BPE tokenizer trained on the texts of JSON Lines
//! files, and random weights for a given configuration.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::tensor::Device;
use clap::Parser;
use decoder::{Config, Decoder, SaveDtype};
use pref_data::{read_jsonl, write_atomic};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, TokenizerBuilder};

/// Make a new, untrained model directory.
#[derive(Debug, Parser)]
#[command(name = "new-model", version)]
struct Args {
    /// Configuration (a Hugging Face config.json); its vocab_size is the tokenizer's size.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// JSON Lines files whose strings train the tokenizer.
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    corpus: Vec<PathBuf>,
    /// Where the model goes.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

const TEMPLATE: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

#[allow(clippy::print_stderr)]
fn main() -> std::process::ExitCode {
    match run(&Args::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::from(1)
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let config = Config::from_file(&args.config)?;
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot create", args.out.display()))?;
    let mut texts = Vec::new();
    for path in &args.corpus {
        for (_, row) in read_jsonl(path)? {
            strings(&row, &mut texts);
        }
    }
    write_tokenizer(&args.out, config.vocab, texts)?;
    let model = Decoder::random(config, &Device::flex(), args.seed);
    fs::copy(&args.config, args.out.join("config.json"))?;
    model.save(&args.out, SaveDtype::F32, usize::MAX)?;
    Ok(())
}

fn strings(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::String(text) => out.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| strings(item, out)),
        Value::Object(map) => map.values().for_each(|item| strings(item, out)),
        _ => {}
    }
}

fn write_tokenizer(dir: &Path, vocab: usize, texts: Vec<String>) -> Result<()> {
    let special: Vec<AddedToken> = SPECIAL.iter().map(|token| AddedToken::from(*token, true)).collect();
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special)
        .build();
    let bytes = ByteLevel::default().add_prefix_space(false);
    let failed = |e: tokenizers::Error| anyhow::anyhow!("training the tokenizer failed: {e}");
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(bytes)))
        .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
        .with_decoder(Some(DecoderWrapper::ByteLevel(bytes)))
        .build()
        .map_err(failed)?;
    tokenizer.train(&mut trainer, texts.into_iter()).map_err(failed)?;
    let text = tokenizer.to_string(true).map_err(failed)?;
    write_atomic(&dir.join("tokenizer.json"), |out| out.write_all(text.as_bytes()))?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": false,
    });
    let text = serde_json::to_string_pretty(&config)?;
    write_atomic(&dir.join("tokenizer_config.json"), |out| out.write_all(text.as_bytes()))?;
    Ok(())
}
