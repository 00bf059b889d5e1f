//! Records that cross the border as JSON text.

use abi_stable::std_types::{RResult, RString};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::sanitize::start_of;
use crate::{Error, Result, Setup};

/// A result that crosses the border; the error is an [`Error`](crate::Error) as JSON.
pub(crate) type Reply<T> = RResult<T, RString>;

/// What a plugin says about itself before it is given a configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub name: String,
    pub version: String,
    #[serde(default)]
    pub license: String,
    #[serde(default)]
    pub conflicts: Vec<ManifestConflict>,
}

/// [`Conflict`](crate::Conflict), owned.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ManifestConflict {
    pub with: String,
    pub why: String,
}

/// The arguments of [`Machinery::reload`](crate::Machinery::reload).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReloadRequest {
    pub setup: Setup,
    pub in_use: Vec<String>,
}

pub(crate) fn to_json<T: Serialize>(record: &T) -> Result<RString> {
    serde_json::to_string(record)
        .map(RString::from)
        .map_err(|error| Error::misbehaved(format!("a record cannot be written as JSON: {error}")))
}

/// Reads a record that has crossed. Its bytes are not taken for text before they were read.
pub(crate) fn from_json<T: DeserializeOwned>(json: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| {
        Error::misbehaved(format!("the {what} makes no sense ({error}): {}", start_of(json)))
    })
}

/// What stands for a method that the other side does not have.
pub(crate) fn unsupported<T>(what: &str) -> Reply<T> {
    reply(Err(Error::unsupported(what)))
}

/// An answer on its way over the border.
pub(crate) fn reply<T>(result: Result<T>) -> Reply<T> {
    match result {
        Ok(value) => RResult::ROk(value),
        Err(error) => {
            // An error always has a JSON form; should it not, its text is still worth something.
            let json = to_json(&error).unwrap_or_else(|_| RString::from(error.to_string()));
            RResult::RErr(json)
        }
    }
}
