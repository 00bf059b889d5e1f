//! How single values are read: Cuckoo's YAML comes from templates that leave optional values empty.
//!
//! A value is checked inside the parser's own call, because only there does an error get its line.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// Reads a string and makes it lowercase.
///
/// # Errors
/// It is not a scalar.
pub fn lowercase<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, |text| Ok(text.to_lowercase()))
}

/// Reads an optional string; null and the empty string are none.
///
/// # Errors
/// It is not a scalar.
pub fn empty_as_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, |text| Ok((!is_empty(text)).then(|| text.to_owned())))
}

/// Reads null as the default.
///
/// # Errors
/// It is neither null nor a `T`.
pub fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads a scalar, as it is written, through `check`.
///
/// # Errors
/// It is not a scalar, or `check` says what is wrong with it; the error has the value's line.
pub fn checked<'de, D, V>(
    deserializer: D,
    check: impl FnOnce(&str) -> Result<V, String>,
) -> Result<V, D::Error>
where
    D: Deserializer<'de>,
{
    deserializer.deserialize_str(Scalar { check, value: PhantomData })
}

/// Whether a scalar, as it is written, says nothing.
pub(super) fn is_empty(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

struct Scalar<F, V> {
    check: F,
    value: PhantomData<V>,
}

impl<F: FnOnce(&str) -> Result<V, String>, V> Visitor<'_> for Scalar<F, V> {
    type Value = V;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a single value")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<V, E> {
        (self.check)(text).map_err(E::custom)
    }

    fn visit_unit<E: de::Error>(self) -> Result<V, E> {
        self.visit_str("")
    }
}
