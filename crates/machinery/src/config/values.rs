//! Reads single values.
//!
//! Cuckoo3 accepts several spellings of a value (`"2042"`, `yes`, one word for a list, spaces around a text).
//! These functions accept the same, so that a file which Cuckoo3 can use works here unchanged.
//! Source: the type loaders in Cuckoo3's `common/config.py`. Its templates leave optional values empty.
//!
//! A value is checked inside the parser's own call, because only there does an error get its line.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// Reads a text without the spaces around it; null becomes the empty text.
///
/// # Errors
/// The value is not a scalar.
pub fn text<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: From<String>,
{
    checked(deserializer, |text| Ok(stripped(text).unwrap_or_default().to_owned().into()))
}

/// Reads a text without the spaces around it and makes it lowercase.
///
/// # Errors
/// The value is not a scalar.
pub fn lowercase<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    text(deserializer).map(|text: String| text.to_lowercase())
}

/// Reads an optional text without the spaces around it; null and the empty text become `None`.
///
/// # Errors
/// The value is not a scalar.
pub fn empty_as_none<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: From<String>,
{
    checked(deserializer, |text| Ok(stripped(text).map(|text| text.to_owned().into())))
}

/// Reads a list of texts, or a single text as a list of one. Null and empty elements are left out.
///
/// # Errors
/// The value is neither. As in Cuckoo3, a single number is neither.
pub fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    deserializer.deserialize_any(Words)
}

/// Reads a boolean in each of Cuckoo3's spellings: `true`, `yes`, `on`, `1` and their opposites.
///
/// # Errors
/// The value is none of them.
pub fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    deserializer.deserialize_any(Flag)
}

/// Reads an optional TCP port: a number from 1 on, quoted or not. Null becomes `None`.
///
/// # Errors
/// The value is not a port.
pub fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    deserializer.deserialize_any(Port)
}

/// Reads null as the default.
///
/// # Errors
/// The value is neither null nor a `T`.
pub fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads a scalar as written, and converts it with `check`.
///
/// # Errors
/// The value is not a scalar, or `check` refuses it. The error has the value's line.
pub fn checked<'de, D, V>(
    deserializer: D,
    check: impl FnOnce(&str) -> Result<V, String>,
) -> Result<V, D::Error>
where
    D: Deserializer<'de>,
{
    deserializer.deserialize_str(Scalar { check, value: PhantomData })
}

/// Returns the scalar without the spaces around it; `None` if it is empty or null.
pub(super) fn stripped(text: &str) -> Option<&str> {
    let text = text.trim();
    (!matches!(text, "" | "~" | "null" | "Null" | "NULL")).then_some(text)
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

struct Words;

impl<'de> Visitor<'de> for Words {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of texts, or one text")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(stripped(text).map(str::to_owned).into_iter().collect())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut words = Vec::new();
        while let Some(Word(word)) = list.next_element()? {
            words.extend(word);
        }
        Ok(words)
    }
}

#[derive(Deserialize)]
struct Word(#[serde(deserialize_with = "empty_as_none")] Option<String>);

/// Source: Cuckoo3's `parse_bool` in `common/utils.py`, behind a parser of YAML 1.1.
struct Flag;

impl Visitor<'_> for Flag {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true or false")
    }

    fn visit_bool<E: de::Error>(self, flag: bool) -> Result<bool, E> {
        Ok(flag)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<bool, E> {
        Ok(number != 0)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<bool, E> {
        Ok(number != 0)
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<bool, E> {
        Ok(number.trunc() != 0.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<bool, E> {
        match text.trim().to_lowercase().as_str() {
            "true" | "yes" | "on" => Ok(true),
            "false" | "no" | "off" | "none" => Ok(false),
            number => match integer(number) {
                Some(number) => Ok(number != 0),
                None => Err(E::custom(format!("'{text}' is not true or false"))),
            },
        }
    }
}

/// Source: Cuckoo3's `Int` in `common/config.py`.
struct Port;

impl Port {
    fn of<E: de::Error>(number: Option<i64>, written: impl fmt::Display) -> Result<Option<u16>, E> {
        let port = number.and_then(|number| u16::try_from(number).ok()).filter(|port| *port > 0);
        port.map(Some).ok_or_else(|| E::custom(format!("{written} is not a TCP port: use 1 to 65535")))
    }
}

impl Visitor<'_> for Port {
    type Value = Option<u16>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TCP port")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
        Self::of(number.try_into().ok(), number)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        Self::of(Some(number), number)
    }

    // Cuckoo3 takes the integer part. A float beyond every integer becomes the nearest integer, which is no
    // port.
    #[allow(clippy::cast_possible_truncation)]
    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Self::Value, E> {
        Self::of(Some(number as i64), number)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        if text.is_empty() {
            return Ok(None);
        }
        Self::of(integer(text.trim()), text)
    }
}

/// Parses a decimal integer. A leading zero is refused: Cuckoo3 reads an unquoted number with one as octal.
fn integer(text: &str) -> Option<i64> {
    let digits = text.trim_start_matches(['+', '-']);
    let ambiguous = digits.len() > 1 && digits.starts_with('0');
    if ambiguous { None } else { text.replace('_', "").parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Values {
        #[serde(deserialize_with = "text")]
        text: String,
        #[serde(deserialize_with = "lowercase")]
        lower: String,
        #[serde(deserialize_with = "empty_as_none")]
        maybe: Option<String>,
        #[serde(deserialize_with = "words")]
        words: Vec<String>,
        #[serde(deserialize_with = "flag")]
        flag: bool,
        #[serde(deserialize_with = "port")]
        port: Option<u16>,
    }

    fn read(yaml: &str) -> Values {
        serde_yaml::from_str(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"))
    }

    #[test]
    fn text_has_no_spaces_around_it() {
        assert_eq!(read("text: '  br 0\t'").text, "br 0");
        assert_eq!(read("text: 18.10").text, "18.10");
        assert_eq!(read("text:").text, "");
        assert_eq!(read("lower: ' Windows '").lower, "windows");
        assert_eq!(read("maybe: ' '").maybe, None);
        assert_eq!(read("maybe: null").maybe, None);
        assert_eq!(read("maybe: ' x '").maybe.as_deref(), Some("x"));
    }

    #[test]
    fn single_word_is_a_list_of_one() {
        assert_eq!(read("words: dotnet").words, ["dotnet"]);
        assert_eq!(read("words: [' a ', 7, '', ~, b]").words, ["a", "7", "b"]);
        assert_eq!(read("words: [18.10]").words, ["18.10"]);
        for none in ["words:", "words: ''", "words: []"] {
            assert!(read(none).words.is_empty(), "{none}");
        }
        for wrong in ["words: 7", "words: {a: b}", "words: [[a]]", "words: true"] {
            assert!(serde_yaml::from_str::<Values>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn flag_is_read_from_every_word_cuckoo_accepts() {
        for yes in
            ["true", "True", "yes", "YES", "on", "On", "1", "'1'", "'true'", "\"yes\"", "2", "1.0", "' 1 '"]
        {
            assert!(read(&format!("flag: {yes}")).flag, "{yes}");
        }
        for no in ["false", "no", "No", "off", "0", "'0'", "'off'", "None", "0.5"] {
            assert!(!read(&format!("flag: {no}")).flag, "{no}");
        }
        for wrong in ["maybe", "''", "", "[true]", "y"] {
            let error = serde_yaml::from_str::<Values>(&format!("flag: {wrong}")).unwrap_err();
            assert!(error.to_string().starts_with("flag: "), "{wrong}: {error}");
        }
    }

    #[test]
    fn port_is_read_with_and_without_quotes() {
        for port in ["8000", "'8000'", "' 8000 '", "+8000", "8_000", "'8_000'", "0x1F40", "8000.0"] {
            assert_eq!(read(&format!("port: {port}")).port, Some(8000), "{port}");
        }
        assert_eq!(read("port:").port, None);
        for wrong in ["0", "65536", "-1", "010", "'010'", "x", "true", "[1]", "1e9", "2:10"] {
            let error = serde_yaml::from_str::<Values>(&format!("port: {wrong}")).unwrap_err();
            assert!(error.to_string().starts_with("port: "), "{wrong}: {error}");
        }
    }
}
