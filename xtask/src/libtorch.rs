//! LibTorch for the backends `tch` and `cuda`: found, or installed from Python's package index.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::root;
use crate::report;

/// The version that the bindings are made for.
const VERSION: &str = "2.9.0";

/// With this variable, which the bindings' own build knows too, `LIBTORCH` may be of another version.
const ANY_VERSION: &str = "LIBTORCH_BYPASS_VERSION_CHECK";

/// What the CPU's library needs besides `torch` itself, which on Linux x86_64 is built with CUDA.
const CPU_PACKAGES: [&str; 2] = ["nvidia-cuda-cupti-cu12==12.8.90", "nvidia-cuda-runtime-cu12==12.8.90"];

/// Where LibTorch is.
pub struct LibTorch {
    /// Directory with `include` and `lib`, for the build.
    home: PathBuf,
    /// Directory of the shared libraries, for the binary.
    lib: PathBuf,
    cuda: bool,
}

impl LibTorch {
    /// By `LIBTORCH`, by an installed Python package, or by installing one.
    pub fn find(cuda: bool) -> Result<Self> {
        if cfg!(windows) || (cuda && !cfg!(target_os = "linux")) {
            bail!("LibTorch is set up on Linux and (without CUDA) on macOS only; use --backend flex or wgpu");
        }
        need_tool("c++", "g++")?;
        let dir = match env::var_os("LIBTORCH") {
            Some(dir) => {
                let given = PathBuf::from(dir);
                // Build scripts run in other directories.
                let dir = given.canonicalize().with_context(|| format!("LIBTORCH={}", given.display()))?;
                if !dir.join("include/ATen").exists() || !dir.join("lib").exists() {
                    bail!("LIBTORCH={}: no LibTorch, which has include/ATen and lib", dir.display());
                }
                let version = version_in(&dir).with_context(|| {
                    format!("LIBTORCH={}: no version in build-version or version.py", dir.display())
                })?;
                if plain(&version) != VERSION && env::var_os(ANY_VERSION).is_none() {
                    bail!(
                        "LIBTORCH={}: is version {version}, needed is {VERSION}; with {ANY_VERSION}=1 it is tried as it is",
                        dir.display()
                    );
                }
                dir
            }
            None => match installed(cuda) {
                Some(dir) => dir,
                None => install(cuda)?,
            },
        };
        if cuda && !dir.join("lib/libtorch_cuda.so").exists() && cfg!(target_os = "linux") {
            bail!(
                "{}: this LibTorch is without CUDA; unset LIBTORCH, or point it to one with CUDA",
                dir.display()
            );
        }
        let lib = dir.join("lib");
        let home = if cuda || !lib.join("libtorch.so").exists() { dir } else { without_cuda(&dir)? };
        Ok(Self { home, lib, cuda })
    }

    /// Environment of a build, and of what it runs.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let path = if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };
        let separated = env::var("CARGO_ENCODED_RUSTFLAGS").ok();
        let plain = || {
            env::var("RUSTFLAGS").ok().map(|flags| flags.split_whitespace().collect::<Vec<_>>().join("\x1f"))
        };
        // The binary finds the library by itself, wherever it is started.
        let mut rpath = format!("-Clink-arg=-Wl,-rpath,{}", self.lib.display());
        if self.cuda {
            // Nothing names a symbol of it: it registers its kernels when it is loaded.
            let cuda = self.lib.join("libtorch_cuda.so");
            rpath = format!("{rpath}\x1f-Clink-arg=-Wl,--no-as-needed,{},--as-needed", cuda.display());
        }
        let flags = match separated.or_else(plain).filter(|flags| !flags.is_empty()) {
            Some(flags) => format!("{flags}\x1f{rpath}"),
            None => rpath,
        };
        let mut search = self.lib.clone().into_os_string();
        if let Some(more) = env::var_os(path).filter(|more| !more.is_empty()) {
            search.push(":");
            search.push(more);
        }
        vec![
            ("LIBTORCH", self.home.clone().into()),
            ("CARGO_ENCODED_RUSTFLAGS", flags.into()),
            (path, search),
        ]
    }
}

/// `2.9.0` of `2.9.0+cu128`.
fn plain(version: &str) -> &str {
    version.split('+').next().unwrap_or(version)
}

/// Version of a LibTorch directory: a release of its own, or a Python package.
fn version_in(dir: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(dir.join("build-version")) {
        return Some(text.trim().to_string());
    }
    let text = fs::read_to_string(dir.join("version.py")).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    Some(line.split(['\'', '"']).nth(1)?.to_string())
}

/// The package of the Python that is active, or the one that was installed here before.
fn installed(cuda: bool) -> Option<PathBuf> {
    let script = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])";
    let output = Command::new("python3").args(["-c", script]).output().ok();
    let found = output.filter(|output| output.status.success()).and_then(|output| {
        let dir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        Some((version_in(&dir)?, dir))
    });
    if let Some((version, dir)) = found {
        if plain(&version) == VERSION && (!cuda || dir.join("lib/libtorch_cuda.so").exists()) {
            return Some(dir);
        }
        let lacks = if plain(&version) == VERSION { "without CUDA".into() } else { format!("not {VERSION}") };
        report(&format!("{}: version {version}, {lacks}; not used", dir.display()));
    }
    let own = own_dir(cuda);
    own.join("complete").exists().then(|| own.join("torch"))
}

fn own_dir(cuda: bool) -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    let name = format!("libtorch-{VERSION}{}", if cuda { "-cuda" } else { "" });
    cache.unwrap_or_else(env::temp_dir).join("clair-apo").join(name)
}

/// Installs with pip into a directory of its own.
fn install(cuda: bool) -> Result<PathBuf> {
    let pip = ["-m", "pip", "--version"];
    if !Command::new("python3").args(pip).output().is_ok_and(|output| output.status.success()) {
        need_package("python3-pip")?;
    }
    let dir = own_dir(cuda);
    let size = match (cuda, cfg!(all(target_os = "linux", target_arch = "x86_64"))) {
        (true, _) => "3.1 GB to download, 6.5 GB on disk",
        (false, true) => "0.9 GB to download, 0.6 GB on disk",
        (false, false) => "0.1 GB to download, 0.4 GB on disk",
    };
    report(&format!("installing LibTorch {VERSION} into {}: {size}", dir.display()));
    fs::remove_dir_all(&dir).ok();
    fs::create_dir_all(&dir).with_context(|| format!("{}: cannot create", dir.display()))?;
    let mut command = Command::new("python3");
    command.args([
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-compile",
        "--no-cache-dir",
        "--target",
    ]);
    command.arg(&dir).arg(format!("torch=={VERSION}"));
    if !cuda {
        // The libraries alone: whatever Python there is, it does not run them.
        command.args(["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]);
        if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            command.args(CPU_PACKAGES);
        }
    }
    let status = command.status().context("cannot run python3 -m pip")?;
    if !status.success() {
        fs::remove_dir_all(&dir).ok();
        bail!(
            "pip could not install torch=={VERSION}; install LibTorch {VERSION} yourself and set LIBTORCH to its directory"
        );
    }
    if !cuda {
        for name in
            ["libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libtorch_python.so"]
        {
            fs::remove_file(dir.join("torch/lib").join(name)).ok();
        }
    }
    fs::write(dir.join("complete"), VERSION)?;
    Ok(dir.join("torch"))
}

/// A directory to link against that names no CUDA library: the `libtorch.so` of a package with CUDA would load all
/// of them.
#[cfg(unix)]
fn without_cuda(dir: &Path) -> Result<PathBuf> {
    let home = root().join("target/libtorch-cpu");
    let (lib, context) = (home.join("lib"), || format!("{}: cannot write", home.display()));
    if fs::read_link(lib.join("libc10.so")).is_ok_and(|to| to == dir.join("lib/libc10.so")) {
        return Ok(home);
    }
    fs::remove_dir_all(&home).ok();
    fs::create_dir_all(&lib).with_context(context)?;
    let link = |from: PathBuf, to: PathBuf| std::os::unix::fs::symlink(from, to).with_context(context);
    link(dir.join("include"), home.join("include"))?;
    fs::write(lib.join("libtorch.so"), "INPUT(-ltorch_cpu -lc10)\n").with_context(context)?;
    // The last one tells that all is there.
    for name in ["libtorch_cpu.so", "libc10.so"] {
        link(dir.join("lib").join(name), lib.join(name))?;
    }
    Ok(home)
}

#[cfg(not(unix))]
fn without_cuda(dir: &Path) -> Result<PathBuf> {
    Ok(dir.to_path_buf())
}

/// Errors where a program is missing that a package would bring, and it cannot be installed.
fn need_tool(program: &str, package: &str) -> Result<()> {
    let found = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if found || cfg!(windows) { Ok(()) } else { need_package(package) }
}

/// Installs a package of Debian where this process may, and says what to do where it may not.
pub fn need_package(package: &str) -> Result<()> {
    let apt =
        |args: &[&str]| Command::new("apt-get").args(args).status().is_ok_and(|status| status.success());
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"));
    if root && apt(&["--version"]) {
        report(&format!("installing {package} with apt-get"));
        let install = ["install", "-y", "-q", "--no-install-recommends", package];
        if apt(&install) || (apt(&["update", "-q"]) && apt(&install)) {
            return Ok(());
        }
    }
    bail!("{package} is missing; install it (Debian, Ubuntu: sudo apt-get install {package})")
}
