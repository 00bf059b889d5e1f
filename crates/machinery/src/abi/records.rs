//! Records that cross the border as JSON text.

use abi_stable::std_types::{RResult, RString};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Reply;
use crate::{Error, Result};

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

pub(crate) fn to_json<T: Serialize>(record: &T) -> Result<RString> {
    serde_json::to_string(record)
        .map(RString::from)
        .map_err(|error| Error::misbehaved(format!("a record cannot be written as JSON: {error}")))
}

pub(crate) fn from_json<T: DeserializeOwned>(text: &str, what: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        let start: String = text.chars().take(80).collect();
        Error::misbehaved(format!("the {what} makes no sense ({error}): {start:?}"))
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
