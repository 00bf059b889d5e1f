//! Reads plain scalars as Cuckoo3's YAML parser does.
//!
//! Cuckoo3 reads its files with PyYAML, which follows YAML 1.1; `serde_yaml` follows YAML 1.2. The patterns
//! are those of PyYAML 6.0's `resolver.py`, the values those of `SafeConstructor` in its `constructor.py`.

/// A plain scalar's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Plain {
    Null,
    Bool(bool),
    /// An integer; `None` if the number does not fit into 128 bits. Python has no such limit.
    Int(Option<i128>),
    Float(f64),
    /// A date, with or without a time of day. `as_written` is true if Python displays the date as written.
    Date {
        as_written: bool,
    },
    /// PyYAML rejects the scalar, and so does Cuckoo3.
    Invalid,
    Text,
}

impl Plain {
    /// Returns the value of a scalar that has neither quotes nor a tag.
    pub fn of(written: &str) -> Plain {
        match written {
            "" | "~" | "null" | "Null" | "NULL" => return Plain::Null,
            "=" | "<<" => return Plain::Invalid,
            _ => {}
        }
        let of_kind = boolean(written).or_else(|| float(written)).or_else(|| integer(written));
        of_kind.or_else(|| date(written)).unwrap_or(Plain::Text)
    }
}

fn boolean(written: &str) -> Option<Plain> {
    let lower = written.to_ascii_lowercase();
    let capitalised = lower.get(..1)?.to_ascii_uppercase() + lower.get(1..)?;
    if ![lower.as_str(), &capitalised, &lower.to_ascii_uppercase()].contains(&written) {
        return None;
    }
    match lower.as_str() {
        "yes" | "true" | "on" => Some(Plain::Bool(true)),
        "no" | "false" | "off" => Some(Plain::Bool(false)),
        _ => None,
    }
}

/// Returns the text after the sign, and whether the sign is a minus.
fn unsigned(written: &str) -> (&str, bool) {
    match written.strip_prefix('-') {
        Some(rest) => (rest, true),
        None => (written.strip_prefix('+').unwrap_or(written), false),
    }
}

fn is_all(text: &str, allowed: impl Fn(u8) -> bool) -> bool {
    text.bytes().all(allowed)
}

fn is_digit_or_line(byte: u8) -> bool {
    byte.is_ascii_digit() || byte == b'_'
}

/// Reports whether the text consists of digits and `_`, and its first character is in `first`.
fn is_number(text: &str, first: std::ops::RangeInclusive<u8>) -> bool {
    text.bytes().next().is_some_and(|byte| first.contains(&byte)) && is_all(text, is_digit_or_line)
}

/// Reports whether the text holds the later places of a base-60 number, such as `54:00` in `52:54:00`.
fn is_base_60(rest: &str) -> bool {
    let place = |place: &str| match place.as_bytes() {
        [ones] => ones.is_ascii_digit(),
        [tens, ones] => (b'0'..=b'5').contains(tens) && ones.is_ascii_digit(),
        _ => false,
    };
    rest.split(':').all(place)
}

fn integer(written: &str) -> Option<Plain> {
    let (digits, negative) = unsigned(written);
    let plain = digits.replace('_', "");
    let radix = |prefix: &str, radix, allowed: fn(u8) -> bool| {
        let rest = digits.strip_prefix(prefix).filter(|rest| !rest.is_empty())?;
        is_all(rest, |byte| byte == b'_' || allowed(byte)).then(|| (rest.replace('_', ""), radix))
    };
    let of_radix = radix("0b", 2, |byte| matches!(byte, b'0' | b'1'))
        .or_else(|| radix("0x", 16, |byte| byte.is_ascii_hexdigit()))
        .or_else(|| radix("0", 8, |byte| (b'0'..=b'7').contains(&byte)));
    let value = if let Some((digits, radix)) = of_radix {
        // PyYAML removes `_` first, so no digit remains of `0x_`, and PyYAML fails.
        if digits.is_empty() && radix != 8 {
            return Some(Plain::Invalid);
        }
        i128::from_str_radix(if digits.is_empty() { "0" } else { &digits }, radix).ok()
    } else if digits == "0" || is_number(digits, b'1'..=b'9') {
        plain.parse().ok()
    } else {
        let (first, rest) = digits.split_once(':')?;
        if !is_number(first, b'1'..=b'9') || !is_base_60(rest) {
            return None;
        }
        plain
            .split(':')
            .try_fold(0_i128, |value, place| value.checked_mul(60)?.checked_add(place.parse().ok()?))
    };
    Some(Plain::Int(value.map(|value| if negative { -value } else { value })))
}

fn float(written: &str) -> Option<Plain> {
    let (digits, negative) = unsigned(written);
    let sign = if negative { -1.0 } else { 1.0 };
    let has_sign = digits.len() < written.len();
    let value = match digits {
        ".inf" | ".Inf" | ".INF" => f64::INFINITY,
        ".nan" | ".NaN" | ".NAN" if !has_sign => f64::NAN,
        _ => {
            let (whole, fraction) = digits.split_once('.')?;
            let plain = digits.replace('_', "");
            if let Some((first, rest)) = whole.split_once(':') {
                let is_float = is_number(first, b'0'..=b'9') && is_base_60(rest);
                if !is_float || !is_all(fraction, is_digit_or_line) {
                    return None;
                }
                plain
                    .split(':')
                    .try_fold(0.0, |value, place| Some(value * 60.0 + place.parse::<f64>().ok()?))?
            } else {
                let fraction_digits = without_exponent(fraction)?;
                let starts_with_point =
                    whole.is_empty() && !has_sign && is_number(fraction_digits, b'0'..=b'9');
                let is_float = is_number(whole, b'0'..=b'9') && is_all(fraction_digits, is_digit_or_line);
                if !starts_with_point && !is_float {
                    return None;
                }
                plain.parse().ok()?
            }
        }
    };
    Some(Plain::Float(sign * value))
}

/// Returns the text before the exponent, if there is one; `None` if the exponent is wrong. An exponent needs
/// a sign.
fn without_exponent(fraction: &str) -> Option<&str> {
    let Some((digits, exponent)) = fraction.split_once(['e', 'E']) else { return Some(fraction) };
    let number = exponent.strip_prefix(['+', '-'])?;
    (!number.is_empty() && is_all(number, |byte| byte.is_ascii_digit())).then_some(digits)
}

fn date(written: &str) -> Option<Plain> {
    let at = written.find(['T', 't', ' ', '\t']);
    let (day, time) = written.split_at(at.unwrap_or(written.len()));
    let fields: Vec<&str> = day.split('-').collect();
    let [year, month, day] = fields[..] else { return None };
    let digits = |text: &str, lengths: std::ops::RangeInclusive<usize>| {
        lengths.contains(&text.len()) && is_all(text, |byte| byte.is_ascii_digit())
    };
    let shortest = if at.is_some() { 1 } else { 2 };
    let is_date = digits(year, 4..=4) && digits(month, shortest..=2) && digits(day, shortest..=2);
    if !is_date || (at.is_some() && !is_time(time)) {
        return None;
    }
    let [year, month, day] = [year, month, day].map(|number| number.parse::<u32>().unwrap_or_default());
    let exists = year > 0 && (1..=12).contains(&month) && (1..=days_of(year, month)).contains(&day);
    let as_written = match time.strip_prefix(' ') {
        Some(clock) => written.len() == 19 && clock.len() == 8 && !clock.ends_with('Z'),
        None => at.is_none(),
    };
    Some(if exists { Plain::Date { as_written } } else { Plain::Invalid })
}

/// Reports whether the text is a time of day that follows a date: `T1:02:03.4`, `  1:02:03 +01:00`.
fn is_time(text: &str) -> bool {
    let clock = text.strip_prefix(['T', 't']).unwrap_or_else(|| text.trim_start_matches([' ', '\t']));
    let end = clock.find(|c: char| !c.is_ascii_digit() && c != ':').unwrap_or(clock.len());
    let (clock, rest) = clock.split_at(end);
    let fields: Vec<usize> = clock.split(':').map(str::len).collect();
    let zone = match rest.strip_prefix('.') {
        Some(fraction) => fraction.trim_start_matches(|c: char| c.is_ascii_digit()),
        None => rest,
    };
    let zone = zone.trim_start_matches([' ', '\t']);
    let offset = zone.strip_prefix(['+', '-']).is_some_and(|zone| {
        let fields: Vec<&str> = zone.split(':').collect();
        is_all(zone, |byte| byte.is_ascii_digit() || byte == b':')
            && matches!(fields.iter().map(|field| field.len()).collect::<Vec<_>>()[..], [1 | 2] | [1 | 2, 2])
    });
    matches!(fields[..], [1 | 2, 2, 2]) && (zone.is_empty() || zone == "Z" || offset)
}

fn days_of(year: u32, month: u32) -> u32 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each value is what PyYAML 6.0.3's `safe_load` returns.
    #[test]
    fn scalars_are_what_pyyaml_makes_of_them() {
        let int = |value| Plain::Int(Some(value));
        for (written, expected) in [
            ("52:54:00:00:01:01", int(41_135_040_061)),
            ("10:20:30:40:50:59", int(8_041_827_059)),
            ("-1:30", int(-90)),
            ("010", int(8)),
            ("-017", int(-15)),
            ("0", int(0)),
            ("00", int(0)),
            ("0x1F", int(31)),
            ("0b101", int(5)),
            ("10_1", int(101)),
            ("+7", int(7)),
            ("170141183460469231731687303715884105728", Plain::Int(None)),
            ("18.10", Plain::Float(18.1)),
            ("10.", Plain::Float(10.0)),
            (".5", Plain::Float(0.5)),
            ("-1.5e+3", Plain::Float(-1500.0)),
            ("1:30.5", Plain::Float(90.5)),
            ("-.INF", Plain::Float(f64::NEG_INFINITY)),
            ("yes", Plain::Bool(true)),
            ("Off", Plain::Bool(false)),
            ("TRUE", Plain::Bool(true)),
            ("~", Plain::Null),
            ("", Plain::Null),
            ("2024-02-29", Plain::Date { as_written: true }),
            ("2024-01-01 01:02:03", Plain::Date { as_written: true }),
            ("2024-1-1 1:02:03", Plain::Date { as_written: false }),
            ("2024-01-01 1:02:03Z", Plain::Date { as_written: false }),
            ("2024-01-01T01:02:03", Plain::Date { as_written: false }),
            ("2024-01-01T01:02:03.5 +01:00", Plain::Date { as_written: false }),
            ("2023-02-29", Plain::Invalid),
            ("=", Plain::Invalid),
            ("0x_", Plain::Invalid),
        ] {
            assert_eq!(Plain::of(written), expected, "{written}");
        }
        assert!(matches!(Plain::of(".NaN"), Plain::Float(value) if value.is_nan()));
    }

    #[test]
    fn other_scalars_are_text() {
        for written in [
            "00:11:22:33:44:55",
            "52:54:00:ab:01:01",
            "52:54:00:60:01:01",
            "10.0.0.1",
            "08",
            "0o17",
            "1e3",
            "1.5e3",
            "-.5",
            "yEs",
            "y",
            "nULL",
            "win10",
            "/usr/bin/tcpdump",
            "2024-1-1",
            "2024-01-01 1:2:3",
            "2024-01-01 01:02:03 +1:0",
            "_1",
            ":1",
            "+.nan",
            "._5",
        ] {
            assert_eq!(Plain::of(written), Plain::Text, "{written}");
        }
    }
}
