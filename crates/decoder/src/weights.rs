//! The tensors of a model directory: safetensors, one file or sharded, or where there are none PyTorch's own
//! files.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use pytorch_reader::{DType, PytorchReader};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::Error;
use crate::checkpoint::read_json;

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const PICKLED: &str = "pytorch_model.bin";
const PICKLED_INDEX: &str = "pytorch_model.bin.index.json";

/// Open files.
pub(crate) enum Files {
    Safetensors(Vec<OpenFile>),
    Pickled(PathBuf, HashMap<String, pytorch_reader::Tensor>),
}

/// A tensor as it is stored.
pub(crate) enum Stored<'a> {
    Mapped(TensorView<'a>),
    Pickled(&'a pytorch_reader::Tensor),
}

impl Files {
    /// Opens the weights of a directory.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let there = |name: &str| dir.join(name).exists();
        let safetensors = there(SINGLE) || there(INDEX);
        if safetensors || !(there(PICKLED) || there(PICKLED_INDEX)) {
            let files = names(dir, SINGLE, INDEX)?;
            let open = files.into_iter().map(|name| OpenFile::open(dir.join(name)));
            return Ok(Self::Safetensors(open.collect::<Result<_, _>>()?));
        }
        let mut all = HashMap::new();
        for name in names(dir, PICKLED, PICKLED_INDEX)? {
            let path = dir.join(name);
            let reader = PytorchReader::new(&path).map_err(|e| Error::Weights {
                path: path.clone(),
                reason: format!("not a PyTorch file: {e}"),
            })?;
            all.extend(reader.into_tensors());
        }
        Ok(Self::Pickled(dir.into(), all))
    }

    /// Opens one safetensors file.
    pub fn single(path: PathBuf) -> Result<Self, Error> {
        Ok(Self::Safetensors(vec![OpenFile::open(path)?]))
    }

    /// The tensors by name. A base model's names lack the `root` of the causal model's: it is added, as
    /// transformers does. An empty `root` leaves them.
    pub fn tensors(&self, root: &str) -> Result<HashMap<String, Stored<'_>>, Error> {
        let mut found = HashMap::new();
        match self {
            Self::Safetensors(files) => {
                for file in files {
                    let tensors = SafeTensors::deserialize(&file.map)
                        .map_err(|e| Error::Safetensors { path: file.path.clone(), reason: e.to_string() })?;
                    found.extend(
                        tensors.tensors().into_iter().map(|(name, view)| (name, Stored::Mapped(view))),
                    );
                }
            }
            Self::Pickled(_, tensors) => {
                found.extend(tensors.iter().map(|(name, tensor)| (name.clone(), Stored::Pickled(tensor))));
            }
        }
        let (outer, _) = root.split_once('.').unwrap_or((root, ""));
        let prefix = format!("{outer}.");
        if !root.is_empty() && !found.keys().any(|name| name.starts_with(&prefix)) {
            found = found.into_iter().map(|(name, tensor)| (with_root(&prefix, name), tensor)).collect();
        }
        Ok(found)
    }

    /// Where the files are, for errors.
    pub fn place(&self) -> &Path {
        match self {
            Self::Safetensors(files) => files.first().map_or(Path::new(""), |file| file.path.as_path()),
            Self::Pickled(dir, _) => dir,
        }
    }
}

fn with_root(prefix: &str, name: String) -> String {
    if name.starts_with("lm_head.") { name } else { format!("{prefix}{name}") }
}

impl Stored<'_> {
    /// Data type; `None` for one that is not supported.
    pub fn dtype(&self) -> Option<Dtype> {
        let supported = [Dtype::F32, Dtype::BF16, Dtype::F16];
        let dtype = match self {
            Self::Mapped(view) => view.dtype(),
            Self::Pickled(tensor) => match tensor.dtype() {
                DType::F32 => Dtype::F32,
                DType::BF16 => Dtype::BF16,
                DType::F16 => Dtype::F16,
                _ => return None,
            },
        };
        supported.contains(&dtype).then_some(dtype)
    }

    /// Name of the data type.
    pub fn dtype_name(&self) -> String {
        match self {
            Self::Mapped(view) => format!("{:?}", view.dtype()),
            Self::Pickled(tensor) => format!("{:?}", tensor.dtype()),
        }
    }

    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Mapped(view) => view.shape(),
            Self::Pickled(tensor) => tensor.shape(),
        }
    }

    pub fn data(&self) -> std::io::Result<Cow<'_, [u8]>> {
        match self {
            Self::Mapped(view) => Ok(Cow::Borrowed(view.data())),
            Self::Pickled(tensor) => tensor.read().map(Cow::Owned),
        }
    }
}

pub(crate) struct OpenFile {
    path: PathBuf,
    map: Mmap,
}

impl OpenFile {
    #[allow(unsafe_code)]
    fn open(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the map is read only while loading; a file changed under it by someone else would
        // give wrong values, as it would with any other way of reading it.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        Ok(Self { path, map })
    }
}

/// Files that hold the weights: the single one, or those that the index names.
fn names(dir: &Path, single: &str, index: &str) -> Result<Vec<String>, Error> {
    let index = dir.join(index);
    if dir.join(single).exists() || !index.exists() {
        return Ok(vec![single.into()]);
    }
    let json = read_json(&index)?;
    let map = json["weight_map"].as_object();
    let map = map.ok_or_else(|| Error::Config { path: index.clone(), reason: "no weight_map".into() })?;
    let mut names: Vec<String> = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(bad) = names.iter().find(|name| name.contains(['/', '\\'])) {
        return Err(Error::Config {
            path: index,
            reason: format!("{bad:?} is not a file of this directory"),
        });
    }
    Ok(names)
}

/// Hash of a model directory's configuration and weights.
pub fn model_hash(dir: &Path) -> Result<String, Error> {
    let is_part = |path: &PathBuf| {
        path.extension().is_some_and(|e| e == "safetensors" || e == "bin")
            || path.file_name().is_some_and(|name| name == "config.json" || name == "adapter_config.json")
    };
    let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_part).collect();
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        hasher.update_mmap(&file).map_err(Error::io(&file))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
