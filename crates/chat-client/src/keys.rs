//! Keys come from the environment or from a file, never from the command line.

use std::path::Path;

use secrecy::SecretString;

use crate::Error;
use crate::provider::Provider;

/// The key in an environment variable: the one named, which must be set, or else the usual one of the server's
/// interface (`OPENAI_API_KEY`, `ANTHROPIC_API_KEY`) where it is.
pub fn api_key(variable: Option<&str>, endpoint: &str) -> Result<Option<SecretString>, Error> {
    let usual = match Provider::of(endpoint) {
        Provider::OpenAi => "OPENAI_API_KEY",
        Provider::Anthropic => "ANTHROPIC_API_KEY",
    };
    match std::env::var(variable.unwrap_or(usual)) {
        Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_string().into())),
        _ => variable.map_or(Ok(None), |name| Err(Error::Key(name.into()))),
    }
}

/// The key in a file that holds nothing else.
pub fn key_file(path: &Path) -> Result<SecretString, Error> {
    let failed = |reason: String| Error::KeyFile { path: path.into(), reason };
    let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    let key = text.trim();
    if key.is_empty() || key.contains(char::is_whitespace) {
        return Err(failed("must hold one key and nothing else".into()));
    }
    Ok(key.to_string().into())
}
