//! Changes of single machines in a configuration file, which leave all other text as it is.

use std::path::Path;

use machinery::Result;
use machinery::config::ConfigFile;
use serde_yaml::{Mapping, Value};

use super::{replace, text};

/// Removes the entry of a machine from the configuration file, and returns the text before and after.
///
/// # Errors
/// The file cannot be read, edited or written. It stays unchanged then.
pub fn remove(path: &Path, name: &str) -> Result<(String, String)> {
    let texts = without(path, name)?;
    apply(path, &texts).map(|()| texts)
}

/// Returns the text of the configuration file before and after the removal of a machine's entry. Nothing is written.
///
/// # Errors
/// The file cannot be read or edited.
pub fn without(path: &Path, name: &str) -> Result<(String, String)> {
    let file = ConfigFile::read(path)?;
    let text = text::remove(&file, name)?;
    let mut expected: Mapping = file.parse()?;
    if let Some(Value::Mapping(machines)) = expected.get_mut("machines") {
        machines.remove(name);
    }
    expect_content(&file, &text, expected)?;
    Ok((file.text, text))
}

/// Writes the text of the file after a change.
///
/// # Errors
/// The file was changed meanwhile, or cannot be written.
pub fn apply(path: &Path, (before, after): &(String, String)) -> Result<()> {
    replace::replace(path, before, after)
}

/// Replaces the value of a key in the entry of a machine, which has it. Returns the text before and after.
///
/// # Errors
/// The file cannot be read, edited or written. It stays unchanged then.
pub fn set(path: &Path, name: &str, key: &str, value: &str) -> Result<(String, String)> {
    let file = ConfigFile::read(path)?;
    let text = text::set(&file, name, key, value)?;
    let mut expected: Mapping = file.parse()?;
    let entry = expected.get_mut("machines").and_then(|machines| machines.get_mut(name));
    if let Some(Value::Mapping(entry)) = entry {
        entry.insert(key.into(), value.into());
    }
    expect_content(&file, &text, expected)?;
    replace::replace(path, &file.text, &text)?;
    Ok((file.text, text))
}

/// Writes the text that the file had before a removal.
///
/// # Errors
/// The file was changed since then, or cannot be written.
pub fn restore(path: &Path, (before, after): &(String, String)) -> Result<()> {
    replace::replace(path, after, before)
}

/// Expects that the new text has this content. No machines may be an empty value.
///
/// # Errors
/// It has another one.
pub fn expect_content(file: &ConfigFile, text: &str, mut expected: Mapping) -> Result<()> {
    let with_machines = |content: &mut Mapping| {
        let machines = content.entry("machines".into()).or_insert(Value::Null);
        if machines.is_null() {
            *machines = Mapping::new().into();
        }
    };
    with_machines(&mut expected);
    match serde_yaml::from_str::<Mapping>(text) {
        Ok(mut got) => {
            with_machines(&mut got);
            (got == expected).then_some(())
        }
        Err(_) => None,
    }
    .ok_or_else(|| text::not_editable(file, "text cannot be changed safely in a file of this form"))
}
