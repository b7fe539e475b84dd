//! Hugging Face model directories: `config.json` and safetensors, one file or sharded, strict both ways.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::{Dtype, View};
use serde_json::{Value, json};

use crate::layout::{Role, Spec};
use crate::model::{Decoder, Weight, to_vec};
use crate::weights::{Files, INDEX, SINGLE, Stored};
use crate::{Config, Error, arch};

/// Data type of a written checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveDtype {
    /// What each weight had in the checkpoint it came from.
    AsLoaded,
    /// 32-bit floats: nothing the training computed is lost.
    F32,
    /// 16-bit brain floats.
    Bf16,
}

impl Config {
    /// Reads a `config.json`.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        arch::parse(path, &read_json(path)?)
    }
}

impl Decoder {
    /// Loads a model directory onto `device`, as `f32`. Every weight of the configuration must be there
    /// with its shape, and nothing else.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, Error> {
        Self::load_as(dir, device, DType::F32)
    }

    /// The same with matrices of another type: `BF16` halves the memory of weights that are not trained. Vectors
    /// and arithmetic stay `f32`.
    pub fn load_as(dir: &Path, device: &Device, matrices: DType) -> Result<Self, Error> {
        Self::read(Config::from_file(&dir.join("config.json"))?, dir, device, matrices)
    }

    /// A model of the same configuration with the weights in `dir`.
    pub fn with_weights_of(&self, dir: &Path) -> Result<Self, Error> {
        Ok(Self::read(self.config().clone(), dir, &self.device(), DType::F32)?.computing_in(self.compute()))
    }

    fn read(config: Config, dir: &Path, device: &Device, matrices: DType) -> Result<Self, Error> {
        let files = Files::open(dir)?;
        let found = files.tensors(config.names.root)?;
        let wanted = config.weights();
        check_names(dir, &config, &wanted, &found)?;
        let weights = wanted
            .into_par_iter()
            .map(|spec| {
                let stored = &found[&spec.name];
                let values = read_weight(&spec.name, &spec.shape, stored, dir, files.place())?;
                let dims = spec.dims();
                let values = if spec.transposed { transposed(&values, dims[1], dims[0]) } else { values };
                let dtype = if spec.role == Role::Vector { DType::F32 } else { matrices };
                let data = TensorData::new(values, dims).convert_dtype(dtype);
                let tensor = Tensor::from_data(data, (device, dtype));
                let stored = stored.dtype().unwrap_or(Dtype::F32);
                let Spec { name, shape, role, transposed } = spec;
                Ok(Weight { name, shape, tensor, stored, role, transposed })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Self::assemble(config, weights))
    }

    /// Writes the weights into `dir` (which must exist) as `model.safetensors`, or as shards of at most
    /// `max_shard` bytes with an index. Each file is written beside its final name and then renamed.
    pub fn save(&self, dir: &Path, dtype: SaveDtype, max_shard: usize) -> Result<(), Error> {
        let entries = entries(self.weights(), dtype);
        let shards = shard(&entries, max_shard);
        if shards.len() == 1 {
            return write_file(&dir.join(SINGLE), &entries);
        }
        let mut map = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            write_file(&dir.join(&name), shard)?;
            map.extend(shard.iter().map(|entry| (entry.weight.name.clone(), name.clone())));
        }
        let total: usize = entries.iter().map(View::data_len).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        write_json(&dir.join(INDEX), &index)
    }
}

/// What a model directory holds besides its weights, in memory: the directory may change or go while a
/// model is trained.
#[derive(Debug, Clone)]
pub struct Companions {
    config: Value,
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Companions {
    /// Their names, without the configuration's.
    pub const FILES: [&str; 9] = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    ];

    /// Reads configuration, tokenizer, chat template and generation settings; files that are not there are
    /// skipped.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let mut files = Vec::new();
        for name in Self::FILES {
            let path = dir.join(name);
            if path.exists() {
                files.push((name, fs::read(&path).map_err(Error::io(path))?));
            }
        }
        Ok(Self { config: read_json(&dir.join("config.json"))?, files })
    }

    /// Replaces the chat template.
    pub fn set_chat_template(&mut self, template: &str) {
        self.files.retain(|(name, _)| *name != "chat_template.jinja");
        self.files.push(("chat_template.jinja", template.into()));
    }

    /// Writes tokenizer and chat template into `dir`.
    pub fn write_tokenizer(&self, dir: &Path) -> Result<(), Error> {
        let files = self.files.iter().filter(|(name, _)| *name != "generation_config.json");
        for (name, bytes) in files {
            fs::write(dir.join(name), bytes).map_err(Error::io(dir.join(name)))?;
        }
        Ok(())
    }

    /// Writes everything into `dir`, with the data type in `config.json`.
    pub fn write(&self, dir: &Path, dtype: SaveDtype) -> Result<(), Error> {
        for (name, bytes) in &self.files {
            fs::write(dir.join(name), bytes).map_err(Error::io(dir.join(name)))?;
        }
        let mut config = self.config.clone();
        let name = match dtype {
            SaveDtype::AsLoaded => None,
            SaveDtype::F32 => Some("float32"),
            SaveDtype::Bf16 => Some("bfloat16"),
        };
        if let (Some(map), Some(name)) = (config.as_object_mut(), name) {
            let keys: Vec<&str> =
                ["dtype", "torch_dtype"].into_iter().filter(|&key| map.contains_key(key)).collect();
            for key in if keys.is_empty() { vec!["torch_dtype"] } else { keys } {
                map.insert(key.into(), name.into());
            }
        }
        write_json(&dir.join("config.json"), &config)
    }
}

/// End-of-sequence ids of a model directory: those of `generation_config.json`, or else of `config.json`.
pub fn eos_ids(dir: &Path) -> Result<Vec<u32>, Error> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let ids: Vec<u32> = match &read_json(&path)?["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
            id => id.as_u64().map(|id| id as u32).into_iter().collect(),
        };
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}

pub(crate) fn read_json(path: &Path) -> Result<Value, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|source| Error::Json { path: path.into(), source })
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).expect("a JSON value serialises");
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text + "\n").map_err(Error::io(&temporary))?;
    fs::rename(&temporary, path).map_err(Error::io(path))
}

/// Errors unless the names wanted and found agree, but for what transformers ignores as well.
fn check_names<T>(
    dir: &Path,
    config: &Config,
    wanted: &[Spec],
    found: &HashMap<String, T>,
) -> Result<(), Error> {
    let missing: Vec<&str> =
        wanted.iter().map(|spec| spec.name.as_str()).filter(|&name| !found.contains_key(name)).collect();
    let known: std::collections::HashSet<&str> = wanted.iter().map(|spec| spec.name.as_str()).collect();
    // Buffers that older checkpoints hold.
    let buffer = |name: &str| {
        name.ends_with("rotary_emb.inv_freq")
            || (config.conv1d && (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")))
    };
    let ignored = |name: &str| (config.tied && name == "lm_head.weight") || buffer(name);
    let mut unexpected: Vec<&str> =
        found.keys().map(String::as_str).filter(|&name| !known.contains(name) && !ignored(name)).collect();
    unexpected.sort_unstable();
    for (what, names) in [("missing", missing), ("unexpected", unexpected)] {
        if !names.is_empty() {
            let shown = names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            let more = if names.len() > 5 { ", …" } else { "" };
            let reason = format!(
                "{} {what} weights for model_type {:?}: {shown}{more}",
                names.len(),
                config.model_type
            );
            return Err(Error::Weights { path: dir.into(), reason });
        }
    }
    Ok(())
}

/// Values of a stored weight as `f32`, if it has the shape it should.
pub(crate) fn read_weight(
    name: &str,
    shape: &[usize],
    stored: &Stored,
    dir: &Path,
    place: &Path,
) -> Result<Vec<f32>, Error> {
    let unusable = |reason: String| Error::Weights { path: dir.into(), reason };
    if stored.shape() != shape {
        let found = stored.shape();
        return Err(unusable(format!("{name} has shape {found:?}, the configuration says {shape:?}")));
    }
    let dtype = stored.dtype().ok_or_else(|| {
        let dtype = stored.dtype_name();
        unusable(format!("{name} is stored as {dtype}; F32, BF16 and F16 are supported"))
    })?;
    Ok(decode(dtype, &stored.data().map_err(Error::io(place))?))
}

/// The transpose of row-major `[rows, cols]` values.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let halves =
        |convert: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|&pair| convert(pair)).collect();
    match dtype {
        Dtype::BF16 => halves(|b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => halves(|b| f16::from_le_bytes(b).to_f32()),
        _ => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

/// A weight on its way into a file; converted only when its turn comes.
#[derive(Clone, Copy)]
struct Entry<'a> {
    weight: &'a Weight,
    dtype: Dtype,
}

impl<'a> Entry<'a> {
    fn new(weight: &'a Weight, dtype: SaveDtype) -> Self {
        let dtype = match dtype {
            SaveDtype::AsLoaded => weight.stored,
            SaveDtype::F32 => Dtype::F32,
            SaveDtype::Bf16 => Dtype::BF16,
        };
        Self { weight, dtype }
    }
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.weight.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let tensor = self.weight.tensor.clone().inner();
        let values = to_vec(if self.weight.transposed { tensor.transpose() } else { tensor });
        let bytes = match self.dtype {
            Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        let width = if self.dtype == Dtype::F32 { 4 } else { 2 };
        self.weight.shape.iter().product::<usize>() * width
    }
}

fn entries(weights: &[Weight], dtype: SaveDtype) -> Vec<Entry<'_>> {
    weights.iter().map(|weight| Entry::new(weight, dtype)).collect()
}

/// Writes weights into one file, as `f32`.
pub(crate) fn write_weights(path: &Path, weights: &[Weight]) -> Result<(), Error> {
    write_file(path, &entries(weights, SaveDtype::F32))
}

fn shard<'a, 'b>(entries: &'b [Entry<'a>], max: usize) -> Vec<&'b [Entry<'a>]> {
    let mut shards = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (i, entry) in entries.iter().enumerate() {
        if size + entry.data_len() > max && i > start {
            shards.push(&entries[start..i]);
            (start, size) = (i, 0);
        }
        size += entry.data_len();
    }
    shards.push(&entries[start..]);
    shards
}

fn write_file(path: &Path, entries: &[Entry]) -> Result<(), Error> {
    let temporary = path.with_extension("tmp");
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let data = entries.iter().map(|entry| (entry.weight.name.as_str(), *entry));
    safetensors::serialize_to_file(data, Some(metadata), &temporary)
        .map_err(|e| Error::io(&temporary)(std::io::Error::other(e.to_string())))?;
    let file = File::open(&temporary).map_err(Error::io(&temporary))?;
    readable(&file).and_then(|()| file.sync_all()).map_err(Error::io(&temporary))?;
    fs::rename(&temporary, path).map_err(Error::io(path))
}

/// The safetensors crate makes private files; a model is not.
#[cfg(unix)]
fn readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &File) -> std::io::Result<()> {
    Ok(())
}
