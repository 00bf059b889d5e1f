//! Records that cross the border as JSON text.

use abi_stable::std_types::{RResult, RString};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::sanitize::start_of;
use crate::{Error, Result, Setup};

/// A result that crosses the border. The error is an [`Error`](crate::Error) as JSON.
pub(crate) type Reply<T> = RResult<T, RString>;

/// A plugin's description of itself, which needs no configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub name: String,
    pub version: String,
    #[serde(default)]
    pub license: String,
    #[serde(default)]
    pub conflicts: Vec<ManifestConflict>,
}

/// A [`Conflict`](crate::Conflict) with owned texts.
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

/// Reads a record from the other side. It takes bytes, because the text may be invalid UTF-8.
pub(crate) fn from_json<T: DeserializeOwned>(json: &[u8], record: &str) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| {
        Error::misbehaved(format!("the {record} makes no sense ({error}): {}", start_of(json)))
    })
}

/// Returns the reply for a method that the other side does not have.
pub(crate) fn unsupported<T>(method: &str) -> Reply<T> {
    reply(Err(Error::unsupported(method)))
}

/// Converts a result into a reply.
pub(crate) fn reply<T>(result: Result<T>) -> Reply<T> {
    match result {
        Ok(value) => RResult::ROk(value),
        Err(error) => {
            // An error always has a JSON form. If it had none, its text would still help.
            let json = to_json(&error).unwrap_or_else(|_| RString::from(error.to_string()));
            RResult::RErr(json)
        }
    }
}
