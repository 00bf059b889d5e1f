//! Reads a configuration file, or a section of it, as a type.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::faults;
use super::file::ConfigFile;
use crate::Result;

impl ConfigFile {
    /// Reads the whole file as `T`.
    ///
    /// # Errors
    /// The file is not YAML, or does not have the form of `T`. The error lists each fault with line, key and value.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        let text = if self.is_blank() { "{}" } else { &self.text };
        let read = |text: &str| serde_yaml::from_str::<T>(text);
        read(text).map_err(|error| faults::all(self, &error, |text| read(text).err()))
    }

    /// Reads the value under the keys of `path` as `T`; `None` if the file has no such key or no value there.
    ///
    /// # Errors
    /// The file is not YAML, or does not have the form of `T`. The error lists each fault with line, key and value.
    pub fn parse_at<T: DeserializeOwned>(&self, path: &[&str]) -> Result<Option<T>> {
        if self.is_blank() {
            return Ok(None);
        }
        let read = |text: &str| {
            let walk = Walk { path, value: std::marker::PhantomData };
            walk.deserialize(serde_yaml::Deserializer::from_str(text))
        };
        read(&self.text).map_err(|error| faults::all(self, &error, |text| read(text).err()))
    }

    fn is_blank(&self) -> bool {
        self.text.lines().all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line == "---" || line == "..."
        })
    }
}

/// Descends along `path` and reads the value there as `T`.
struct Walk<'a, T> {
    path: &'a [&'a str],
    value: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Walk<'_, T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.path.is_empty() {
            return Option::<T>::deserialize(deserializer);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Walk<'_, T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut value = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == self.path[0] {
                value = map.next_value_seed(Walk { path: &self.path[1..], value: self.value })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(value)
    }
}
